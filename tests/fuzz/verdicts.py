"""Shows mutants of artifacts to every reader; they have to say the same, in bounded time and memory:

python tests/fuzz/verdicts.py COUNT [FIRST]

Mutant number n of FIRST to FIRST + COUNT - 1 depends on n only, so that a run may be made in parts, and one that fails
is run again with COUNT = 1. Ends with 1 where a reader raises something else than an ArtifactError, two readers
disagree, or one takes more than a second or 300 MB beyond the file's size.
"""

from __future__ import annotations

import faulthandler
import sys
import tempfile
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from fuzz.corpus import attention_program
from support.artifact_mutants import any_mutant
from support.artifact_verdicts import Figures
from support.counting_programs import counting_program
from support.program_cases import masked, small_program, with_maps
from support.spiking_programs import spiking_program

from swincompress_pl import spec
from swincompress_pl.accel import artifact


def programs() -> list[spec.Program]:
    """What is changed: every kind of operation occurs."""
    counting = counting_program()
    dense = [small_program(3), small_program(2, channels=7, weight="int3"), with_maps(small_program(4))]
    spiking = [spiking_program(), counting, spec.binary_steps(counting)]
    return [*dense, masked(small_program(3, weight="int5"), 0.7), attention_program(), *spiking]


def run(numbers: range) -> Figures:
    """The figures of these mutants; each stands in a file, which is left where a reader ends the process."""
    changed = programs()
    wholes = [artifact.to_bytes(program, how) for program in changed for how in (None, "lzma")]
    figures = Figures()
    folder = Path(tempfile.mkdtemp(prefix="mutants-"))
    path = folder / "mutant.safetensors"
    for number in numbers:
        figures.add(path, any_mutant(changed, wholes, number), f"mutant {number}")
        if figures.files % 10_000 == 0:
            print(figures, flush=True)
    path.unlink(missing_ok=True)
    folder.rmdir()
    return figures


if __name__ == "__main__":
    faulthandler.enable()
    warnings.simplefilter("ignore")
    count, first = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    found = run(range(first, first + count))
    print(*found.failures, found, sep="\n")
    sys.exit(bool(found.failures))
