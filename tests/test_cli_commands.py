"""The command line: helps that are quick and have examples, errors in one line, and the whole road in small."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml  # type: ignore[import-untyped]
from support.spiking_programs import spiking_program

from swincompress_pl import __version__, accel, cli
from swincompress_pl.cli import COMMANDS, main
from swincompress_pl.cli.common import integers
from swincompress_pl.cli.inspect import describe_artifact, summarize
from swincompress_pl.spec.kind import Call

REPOSITORY = Path(__file__).resolve().parent.parent
GOLDEN = REPOSITORY / "tests" / "golden" / "0.1"
CONFIGS = sorted((REPOSITORY / "configs").glob("*.yaml"))

TINY: dict[str, Any] = {
    "model": {
        "class_path": "CompressibleClassifier",
        "init_args": {
            "model": "SwinTransformer",
            "num_classes": 10,
            "model_kwargs": {
                "img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 16, "depths": [2], "num_heads": [2]
            },
        },
    },
    "data": {"class_path": "Digits", "init_args": {"batch_size": 32, "holdout": 60}},
    "trainer": {
        "max_epochs": 2,
        "limit_train_batches": 2,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [
            {"class_path": "AdaptiveIterativePruning", "init_args": {"tolerance": 99.0, "step": 0.25, "max_rounds": 1}},
            {
                "class_path": "QuantizationAwareTraining",
                "init_args": {"start_epoch": 1, "calibration_images": 32, "method": "max"},
            },
            {"class_path": "CompressedCheckpoint", "init_args": {"filename": "best"}},
        ],
    },
}  # fmt: skip


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of the command."""
    try:
        code = main(arguments)
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(autouse=True)
def _argv(monkeypatch: pytest.MonkeyPatch) -> None:
    """`fit` writes sys.argv for Lightning."""
    monkeypatch.setattr(sys, "argv", ["swincompress"])


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Swin fitted: best.ckpt and compress.yaml with pruning and quantization, float.ckpt without them."""
    directory = tmp_path_factory.mktemp("run")
    config = json.loads(json.dumps(TINY))
    config["trainer"]["callbacks"][-1]["init_args"]["dirpath"] = str(directory)
    config["trainer"]["default_root_dir"] = str(directory)
    (directory / "compress.yaml").write_text(yaml.safe_dump(config))
    checkpoint = {"class_path": "ModelCheckpoint", "init_args": {"dirpath": str(directory), "filename": "float"}}
    config["trainer"] |= {"callbacks": [checkpoint], "max_epochs": 1}
    (directory / "float.yaml").write_text(yaml.safe_dump(config))
    before = sys.argv[:]
    try:
        for name in ("compress", "float"):
            sys.argv[:] = ["swincompress"]
            assert main(["fit", "-c", str(directory / f"{name}.yaml")]) == 0
    finally:
        sys.argv[:] = before
    return directory


@pytest.fixture(scope="module")
def artifact(run_directory: Path) -> Path:
    output = run_directory / "model.safetensors"
    assert main(["export", str(run_directory / "best.ckpt"), "-o", str(output)]) == 0
    return output


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(["--help"], capsys)
    assert code == 0
    assert all(f"\n  {name} " in out for name in COMMANDS)
    assert "example:" in out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_has_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run([name, "--help"], capsys)
    assert code == 0
    assert f"\n  swincompress {name} " in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"], capsys) == (0, f"swincompress {__version__}\n", "")


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from swincompress_pl.cli import main; main(['--help']); main(['--version']);"
        "heavy = {'torch', 'lightning', 'matplotlib', 'jsonargparse', 'rich'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY, stdout=subprocess.DEVNULL)


def test_a_process_does_not_look_for_garbage_at_its_end() -> None:
    code = (
        "import atexit, gc, sys; from swincompress_pl.cli import main; sys.argv[1:] = ['--version']; main();"
        "atexit.register(lambda: print(gc.get_freeze_count()));"  # what is registered first runs last
        "atexit._run_exitfuncs(); print(gc.get_freeze_count())"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    _, before, after = done.stdout.splitlines()
    assert int(before) == 0 < int(after)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compress"], "unknown command 'compress'; commands are demo, fit"),
        (["report", "gone"], "no record of a run there"),
        (["inspect", "gone.safetensors"], "gone.safetensors: there is no such file"),
        (["bench"], "give either an artifact or --kernel"),
        (["bench", "--kernel", "linear", "--batch", "2", "--operations"], "--batch, --operations: only for an "),
        (["bench", "model.safetensors", "--shape", "8,8,8"], "--shape: only for --kernel; leave it out"),
        (["bench", "--kernel", "conv3d"], "unknown kernel 'conv3d'; kernels are linear"),
        (["bench", "--kernel", "linear", "--shape", "8,8"], "--shape is '8,8'; give 3 positive integers"),
        (["bench", "--kernel", "linear", "--implementation", "nope"], "'nope' is unknown"),
        (["bench", "x", "--threads", "0"], "--threads is 0"),
        (["export", "x.ckpt", "-o", "y", "--quantize", "max"], "--quantize and --data go together"),
        (["export", "x.ckpt", "-o", "y", "--bits", "W4A8"], "--bits W4A8 goes with --quantize"),
        (["export", "x.ckpt", "-o", "y", "--quantize", "affine", "--data", "z"], "'affine'; choose searched or max"),
        (["export", "gone.ckpt", "-o", "y"], "gone.ckpt: there is no such file"),
        (["demo", "--threads", "0"], "--threads is 0"),
    ],
)
def test_a_users_error_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(arguments, capsys)
    assert code == 2
    assert message in err
    assert len(err.splitlines()) == 1
    assert err.startswith("swincompress: error: ")


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run([], capsys)
    assert code == 2
    assert "commands:" in out


def test_an_unknown_option_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(["inspect", "x", "--jsn"], capsys)
    assert code == 2
    assert "--jsn" in err


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(FileNotFoundError):
        main(["inspect", "gone.safetensors", "--debug"])


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cli.COMMANDS, "report", ("no_such_module_at_all", ""))

    def broken(_: str) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(cli.importlib, "import_module", broken)
    with pytest.raises(RuntimeError, match="a defect"):
        main(["report", "x"])


@pytest.mark.parametrize("text", ["", "1,", "0", "-1,2", "1.5", "a"])
def test_wrong_integers_name_their_option(text: str) -> None:
    with pytest.raises(ValueError, match="--threads is"):
        integers(text, "--threads")


def test_a_file_that_is_neither_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text("hello, this is no artifact")
    (tmp_path / "zip").write_bytes(b"PK\x03\x04 and no checkpoint")
    code, _, err = run(["inspect", str(tmp_path / "text")], capsys)
    assert (code, "not a safetensors file" in err) == (2, True)
    code, _, err = run(["inspect", str(tmp_path / "zip")], capsys)
    assert (code, "no checkpoint of plain data" in err) == (2, True)
    torch.save({"weights": torch.zeros(2)}, tmp_path / "bare.ckpt")
    code, _, err = run(["inspect", str(tmp_path / "bare.ckpt")], capsys)
    assert (code, "it has no state_dict" in err) == (2, True)


def test_inspect_tells_a_checkpoints_history(run_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(["inspect", str(run_directory / "best.ckpt"), "--json"], capsys)
    described = json.loads(out)
    assert code == 0
    assert described["hyperparameters"]["model"] == "SwinTransformer"
    assert [next(iter(entry)) for entry in described["history"]] == ["prune", "quantize"]
    code, out, _ = run(["inspect", str(run_directory / "best.ckpt")], capsys)
    assert "1. prune " in out
    assert "2. quantize, method max" in out


@pytest.mark.parametrize("name", ["masked", "primesvt_paper", "pruned", "quantized"])
def test_inspect_knows_every_entry_of_its_own_version(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(["inspect", str(GOLDEN / f"{name}.ckpt")], capsys)
    assert code == 0
    assert "unknown" not in out
    if name == "masked":
        assert "1. mask 8 weights: blocks.0.attn.qkv.weight, " in out


def test_inspect_tells_what_was_unmasked_and_what_it_does_not_know() -> None:
    assert summarize({"unmask": ["a.weight"]}) == "unmask 1 weights: a.weight"
    assert summarize({"fold": {}}) == "fold (unknown to this version)"


def test_inspect_of_a_newer_checkpoint_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = torch.load(GOLDEN / "pruned.ckpt", weights_only=True)
    checkpoint["swincompress_pl"]["version"] = 99
    torch.save(checkpoint, tmp_path / "newer.ckpt")
    code, _, err = run(["inspect", str(tmp_path / "newer.ckpt")], capsys)
    assert (code, "version 99" in err, "update swincompress_pl" in err) == (2, True, True)


@pytest.mark.parametrize(("events", "shape"), [(True, "(N, 3, 8, 8, 2)"), (False, "(N, 8, 8, 3)")])
def test_inspect_tells_the_shape_of_images_and_of_events(
    events: bool, shape: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = accel.export(spiking_program(events=events, steps=3), tmp_path / "model.safetensors")
    code, out, _ = run(["inspect", str(file)], capsys)
    assert code == 0
    assert f"input: uint8 {shape};" in out


def test_inspect_tells_the_bounds_that_the_check_proves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proved: list[int | None] = []
    prove = Call.accumulator

    def counted(call: Call, *arguments: Any) -> None:
        prove(call, *arguments)
        proved.append(call.accumulator_reach)

    file = accel.export(spiking_program(), tmp_path / "model.safetensors")
    monkeypatch.setattr(Call, "accumulator", counted)
    told = [operation["accumulator_bound"] for operation in describe_artifact(file)["operations"]]
    bounds = [bound for bound in told if bound is not None]
    assert bounds == proved[-len(bounds) :]
    assert len(proved) == len(bounds) > 4, "each operation once"


def test_inspect_tells_an_artifacts_operations(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(["inspect", str(artifact), "--json"], capsys)
    described = json.loads(out)
    assert code == 0
    assert described["file_bytes"] == artifact.stat().st_size == described["size"]["file_bytes"]
    assert described["macs"] == sum(operation["macs"] for operation in described["operations"]) > 0
    bounds = [operation["accumulator_bound"] for operation in described["operations"] if operation["kind"] == "linear"]
    assert bounds
    assert all(0 < bound < 2**31 for bound in bounds)
    code, out, _ = run(["inspect", str(artifact)], capsys)
    assert (code, "head" in out, "uint8 (N, 32, 32, 3)" in out) == (0, True, True)


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_a_compressed_checkpoint_is_evaluated(
    run_directory: Path, stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [stage, "-c", str(run_directory / "compress.yaml"), "--ckpt_path", str(run_directory / "best.ckpt")]
    code, out, _ = run(arguments, capsys)
    assert code == 0
    assert f"{'val' if stage == 'validate' else 'test'}/top1" in out


def test_export_checks_what_it_wrote(run_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["export", str(run_directory / "best.ckpt"), "-o", str(tmp_path / "a"), "--reference-check", "1"]
    code, out, _ = run(arguments, capsys)
    assert code == 0
    assert "identical integer logits on 1 random images" in out


def test_export_of_a_float_checkpoint_says_what_to_do(
    run_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "model.safetensors"
    code, _, err = run(["export", str(run_directory / "float.ckpt"), "-o", str(output)], capsys)
    assert (code, output.exists()) == (2, False)
    assert "is not quantized" in err
    assert "QuantizationAwareTraining" in err


def test_export_quantizes_a_float_checkpoint(
    run_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "model.safetensors"
    quantize = ["--quantize", "max", "--data", str(run_directory / "float.yaml"), "--images", "32"]
    code, out, _ = run(["export", str(run_directory / "float.ckpt"), "-o", str(output), *quantize], capsys)
    assert code == 0
    assert "identical" in out
    code, _, err = run(["export", str(run_directory / "best.ckpt"), "-o", str(output), *quantize], capsys)
    assert (code, "is quantized already" in err) == (2, True)
    narrow = [*quantize, "--bits", "W4A6", "--compression", "lzma"]
    code, out, _ = run(["export", str(run_directory / "float.ckpt"), "-o", str(output), *narrow], capsys)
    assert code == 0
    assert "reference, torch: identical" in out
    assert "W4A6: the C++ engine runs 8-bit activations" in out


def test_export_into_a_missing_folder_fails_early(
    run_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["export", str(run_directory / "best.ckpt"), "-o", str(tmp_path / "gone" / "model")]
    code, _, err = run(arguments, capsys)
    assert (code, "does not exist; make it first" in err) == (2, True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no.such.Class", "cannot be imported"),
        ("Class", "cannot be imported"),
        ("pathlib.Path", "is no LightningModule"),
        ("lightning.pytorch.demos.boring_classes.BoringModel", "does not load as"),
    ],
)
def test_export_with_a_wrong_class(
    run_directory: Path, tmp_path: Path, name: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["export", str(run_directory / "best.ckpt"), "-o", str(tmp_path / "a"), "--model-class", name]
    code, _, err = run(arguments, capsys)
    assert code == 2
    assert message in err


def test_bench_measures_an_artifact(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(["bench", str(artifact), "--threads", "1", "--batch", "2", "--rounds", "1", "--json"], capsys)
    figures = json.loads(out)
    assert code == 0
    assert figures["answers"]["equal_to_reference"] is True
    assert figures["results"][0]["latency"]["batch"] == 2
    assert figures["results"][0]["file_bytes"] == figures["file_bytes"] == artifact.stat().st_size
    assert figures["results"][0]["load_ms"] > 0
    code, out, _ = run(["bench", str(artifact), "--threads", "1", "--rounds", "1", "--operations"], capsys)
    assert (code, "identical to the reference" in out, "patch_embed.proj" in out) == (0, True, True)
    assert re.search(r"load\s+ms", out)


@pytest.mark.slow
def test_bench_compares_torch_on_the_pruned_architecture(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", str(artifact), "--threads", "1", "--rounds", "1", "--against", "torch", "--json"]
    code, out, _ = run(arguments, capsys)
    figures = json.loads(out)
    assert code == 0
    assert [result["name"] for result in figures["results"]] == ["engine", "torch fp32"]
    assert figures["results"][1]["unavailable"] is None
    assert figures["times_engine"]["torch fp32"]["median"] > 0


def test_bench_of_a_checkpoint_names_the_way(run_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(["bench", str(run_directory / "best.ckpt")], capsys)
    assert (code, "swincompress export" in err) == (2, True)


def test_bench_of_a_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(["bench", "--kernel", "linear", "--shape", "4,8,16", "--json"], capsys)
    assert code == 0
    assert all(outcome["equal_to_norm"] and outcome["macs"] == 512 for outcome in json.loads(out))


def test_fit_refuses_an_unknown_callback_option(run_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = yaml.safe_load((run_directory / "compress.yaml").read_text())
    config["trainer"]["callbacks"][1]["init_args"]["start_epoc"] = 1
    file = run_directory / "wrong.yaml"
    file.write_text(yaml.safe_dump(config))
    code, _, err = run(["fit", "-c", str(file)], capsys)
    assert code == 2
    assert "start_epoc" in err


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_are_accepted(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = [] if config.stem == "digits_swin" else ["--data.root", str(tmp_path)]
    code, out, err = run(["fit", "-c", str(config), *root, "--print_config"], capsys)
    assert code == 0, err
    callbacks = [entry["class_path"].rsplit(".", 1)[1] for entry in yaml.safe_load(out)["trainer"]["callbacks"]]
    expected = ["AdaptiveIterativePruning", "QuantizationAwareTraining", "CompressedCheckpoint"]
    assert callbacks[:3] == (["PrimeSVT", "ModelCheckpoint"] if config.stem == "spikformer_cifar10" else expected)


def test_there_are_configs() -> None:
    assert {path.stem for path in CONFIGS} >= {"digits_swin", "deit_tiny_imagenet", "swin_tiny_imagenet"}


def test_a_float_checkpoint_becomes_onnx(
    run_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    output = tmp_path / "model.onnx"
    code, out, _ = run(["export", str(run_directory / "float.ckpt"), "-o", str(output), "--float"], capsys)
    assert code == 0
    assert "float, images (N, " in out
    assert float(out.split("at most ")[1].split(" ")[0]) < 1e-4
    code, _, err = run(["export", str(run_directory / "best.ckpt"), "-o", str(tmp_path / "b.onnx"), "--float"], capsys)
    assert code != 0
    assert "is quantized; --float takes a checkpoint from before" in err
    assert not (tmp_path / "b.onnx").exists()


def test_a_quantized_checkpoint_becomes_onnx(
    run_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    arguments = ["export", str(run_directory / "best.ckpt"), "-o", str(tmp_path / "model.onnx")]
    code, out, _ = run(arguments, capsys)
    assert code == 0
    assert "identical integer logits on 2 random images" in out
