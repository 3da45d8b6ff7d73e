from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt

class OperationDescription(TypedDict):
    """One operation as the extension takes it; `inputs` are numbers of values: the inputs, then every output."""

    kind: str
    name: str
    inputs: Sequence[int]
    dtype: str
    attributes: Mapping[str, int | Sequence[int]]
    tensors: Mapping[str, npt.NDArray[Any]]

class ModelFacts(TypedDict):
    """What a loaded artifact tells about itself."""

    input_shape: tuple[int, ...]
    logit_scale: float
    class_count: int
    classes: tuple[str, ...] | None

class CodedError(ValueError): ...

def load(content: bytes, implementation: str, threads: int) -> tuple[Engine, ModelFacts]: ...
def read(content: bytes) -> tuple[str, dict[str, npt.NDArray[Any]]]: ...
def implementations() -> list[str]: ...
def peak_gmacs(implementation: str, threads: int) -> float: ...
def usable_cpus(root: str = "") -> int: ...
def select(implementation: str = "") -> str: ...

class Engine:
    def __init__(
        self,
        inputs: Sequence[tuple[str, Sequence[int], int]],  # (type, shape, largest magnitude)
        operations: Sequence[OperationDescription],
        implementation: str = "",
        threads: int = 1,
    ) -> None: ...
    def run(self, arrays: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]: ...
    def profile(self, arrays: Sequence[npt.NDArray[Any]], repeats: int) -> npt.NDArray[np.int64]: ...
    def count_spikes(self, arrays: Sequence[npt.NDArray[Any]]) -> npt.NDArray[np.int64]: ...
    @property
    def implementation(self) -> str: ...
    @property
    def threads(self) -> int: ...
    @property
    def steps(self) -> list[list[int]]: ...
    @property
    def chunk(self) -> int: ...
    @property
    def arena_bytes(self) -> int: ...
