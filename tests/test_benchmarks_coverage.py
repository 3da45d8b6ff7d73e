"""The table of names: its rows on tiny networks, and its page."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from timm.models.deit import VisionTransformerDistilled
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer

from benchmarks.coverage.__main__ import PAGE, RESULTS
from benchmarks.coverage.networks import CASES, timm_case
from benchmarks.coverage.page import page
from benchmarks.coverage.rows import row_of

TINY: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 4}


def test_a_row_tells_what_works() -> None:
    row = row_of(timm_case("vit_tiny_patch16_224", **TINY))
    assert (row["class"], row["equal"], row["kinds"]) == (
        "VisionTransformer",
        True,
        ["embed", "head_dim", "heads", "mlp"],
    )
    assert row["left"] < row["parameters"]
    assert row["correlation"] > 0.99


def test_a_row_tells_what_is_refused() -> None:
    row = row_of(timm_case("vit_tiny_patch16_224", global_pool="max", **TINY))
    assert "global_pool='max'" in row["refused"]
    assert row["refused_after_s"] < 60
    assert row["kinds"] == ["embed", "head_dim", "heads", "mlp"]
    none = row_of(timm_case("convnext_atto"))
    assert "no adapter" in none["refused"]
    text = page([row, none])
    assert "Of 2 rows 0 have integers" in text
    assert "1. `vit_tiny_patch16_224`: VisionTransformer: global_pool='max'" in text


def test_the_table_has_the_classes_and_libraries() -> None:
    libraries = Counter(case.library for case in CASES)
    assert len(CASES) >= 40
    assert libraries["torchvision"] + libraries["transformers"] >= 12


def test_the_page_is_what_the_results_make() -> None:
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert [(row["library"], row["name"]) for row in rows] == [(case.library, case.name) for case in CASES]
    assert PAGE.read_text(encoding="utf-8") == page(rows)
    timms = (VisionTransformer, VisionTransformerDistilled, SwinTransformer, SwinTransformerV2)
    assert {kind.__name__ for kind in timms} <= {row.get("class") for row in rows}
    assert all(row["equal"] and row["correlation"] >= 0.99 for row in rows if "refused" not in row)
