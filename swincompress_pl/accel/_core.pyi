from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict

import numpy as np
import numpy.typing as npt

Content = bytes | npt.NDArray[np.uint8]

class OperationDescription(TypedDict):
    """One operation as the extension takes it; `inputs` are numbers of values: the inputs, then every output."""

    kind: str
    name: str
    inputs: Sequence[int]
    dtype: str
    attributes: Mapping[str, int | Sequence[int]]
    tensors: Mapping[str, npt.NDArray[Any]]
    tuning: NotRequired[tuple[int, int]]  # bytes, 0 for the default; percent, -1 for the default

class ModelFacts(TypedDict):
    """What a loaded artifact tells about itself."""

    input_shape: tuple[int, ...]
    logit_scale: float
    class_count: int
    classes: tuple[str, ...] | None
    outputs: list[tuple[str, str, tuple[int, ...], float]]  # (name, type, shape, scale); empty where it gives logits

class CodedError(ValueError): ...

def load(
    content: Content,
    implementation: str,
    threads: int,
    spend: bool = False,
    tunings: Mapping[int, tuple[int, int]] = {},  # by the number of the operation
) -> tuple[Engine, ModelFacts]: ...
def read(content: Content) -> tuple[str, dict[str, npt.NDArray[Any]]]: ...
def parse_content(content: bytes) -> tuple[str | None, str | None]: ...
def implementations() -> list[str]: ...
def event_largest(implementation: str) -> int: ...
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
        results: Sequence[int] = (),  # numbers of values; the last one where there are none
    ) -> None: ...
    def run(self, arrays: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]: ...
    def run_all(self, arrays: Sequence[npt.NDArray[Any]]) -> list[npt.NDArray[Any]]: ...
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
