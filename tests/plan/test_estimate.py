"""The plan reproduces what the original TinyLlama published, and lists what it assumes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tinyllama.hardware import HARDWARE_SPECS
from tinyllama.plan.estimate import Assumptions, estimate
from tinyllama.recipe import Recipe

PUBLISHED = Assumptions(gpus=16, mfu=0.52, price_per_gpu_hour=1.5)


def figures(
    fields: dict[str, object] | None = None, assumptions: Assumptions = PUBLISHED, machine: str = "a100-40g"
) -> dict[str, Any]:
    return estimate(Recipe.load("tinyllama-1.1b", fields), 32_000, HARDWARE_SPECS[machine], assumptions).as_json()


def test_published_figures_of_tinyllama() -> None:
    found = figures()
    assert found["parameters"] == 1_100_048_384
    assert found["tokens_per_second_per_gpu"] == pytest.approx(24_000, rel=0.01)
    assert found["days"] == pytest.approx(90, rel=0.01)
    assert found["store_bytes"] == pytest.approx(1.8e12, rel=0.01)
    assert figures({"train.tokens": "300B"})["gpu_hours"] == pytest.approx(3456, rel=0.01)


def test_16k_tokens_fit_in_40_gb_without_checkpointing() -> None:
    found = figures()
    assert found["micro_batch_sequences"] * 2048 == 16_384
    assert found["memory_fits"]
    assert found["largest_micro_batch_sequences"] == 8


def test_weights_gradients_and_moments_are_sharded() -> None:
    components = figures()["memory_bytes_by_component"]
    bytes_per_parameter = {"weights": 4, "gradients": 4, "optimizer": 8}
    assert {name: round(16 * components[name] / 1_100_048_384) for name in bytes_per_parameter} == bytes_per_parameter


def test_longer_sequences_take_more_flops_and_equal_memory_per_token() -> None:
    """A micro-batch has a quarter of the sequences, and therefore the same number of tokens."""
    longer: dict[str, object] = {"model.context_length": 8192, "train.sequence_length": 8192}
    longer |= {"train.batch_sequences": 256, "train.micro_batch_sequences": 2, "model.rope_theta": 500_000}
    short, long = figures(), figures(longer)
    assert (short["tokens"], short["steps"]) == (long["tokens"], long["steps"])
    assert long["flops_per_token"] - short["flops_per_token"] == 6 * 22 * 2048 * (8192 - 2048)
    assert long["total_flops"] == long["tokens"] * long["flops_per_token"]
    slower = long["tokens_per_second"] * long["flops_per_token"] / short["flops_per_token"]
    assert slower == pytest.approx(short["tokens_per_second"], rel=1e-6)
    activations = [found["memory_bytes_by_component"]["activations"] for found in (short, long)]
    assert activations[0] == activations[1]
    larger = figures(longer | {"train.micro_batch_sequences": 8})
    assert larger["memory_bytes_per_gpu"] > 2 * long["memory_bytes_per_gpu"]


def test_fp32_is_planned_with_the_fp32_peak() -> None:
    bf16, fp32 = figures(), figures({"train.precision": "fp32"})
    assert fp32["tokens_per_second_per_gpu"] / bf16["tokens_per_second_per_gpu"] == pytest.approx(19.5 / 312)


def test_16_bit_precisions_differ_only_in_the_copied_heads_of_fp16() -> None:
    bf16, fp16 = figures(), figures({"train.precision": "fp16"})
    assert fp16["tokens_per_second_per_gpu"] == bf16["tokens_per_second_per_gpu"]
    copied = 22 * 16_384 * 2 * 2 * (2048 - 256)  # layers x tokens x bytes x (keys and values)
    assert fp16["memory_bytes_per_gpu"] - bf16["memory_bytes_per_gpu"] == copied


def test_float8_copies_only_the_head() -> None:
    fields: dict[str, object] = {"train.float8": True, "parallel.activation_checkpointing": "none"}
    kept = figures(fields, Assumptions(), "h200")
    assert kept["keeps_weights"]
    assert kept["memory_bytes_by_component"]["weight_copies"] == 2 * 32_000 * 2048
    one_micro_batch = figures(fields | {"train.batch_sequences": 8}, Assumptions(), "h200")
    assert "weight_copies" not in one_micro_batch["memory_bytes_by_component"]


def test_hybrid_sharding_avoids_the_latency_of_a_wide_ring() -> None:
    fields: dict[str, object] = {"train.batch_sequences": 4096}
    assumptions = Assumptions(gpus=4096)
    assert not figures(fields, assumptions)["network_is_hidden"]
    assert figures(fields | {"parallel.replicate": 512}, assumptions)["network_is_hidden"]


def test_hybrid_sharding_reduces_traffic_on_a_slow_network() -> None:
    sharded, hybrid = (figures({"parallel.replicate": count}, machine="l40s") for count in (1, 2))
    assert hybrid["memory_bytes_by_component"]["weights"] == pytest.approx(4 * 1_100_048_384 / 8, abs=1)
    assert hybrid["network_seconds_per_step"] < sharded["network_seconds_per_step"]


def test_slow_network_determines_the_step_time() -> None:
    slow = figures({"train.micro_batch_sequences": 1}, Assumptions(gpus=64), "4090")
    assert not slow["network_is_hidden"]
    assert slow["mfu"] < 0.5
    assert slow["step_seconds"] == pytest.approx(slow["network_seconds_per_step"])


def test_cost_includes_time_lost_to_failures() -> None:
    found = figures()
    hours = 24 * 16 * found["days_with_losses"]
    assert hours > found["gpu_hours"]
    assert found["cost"] == pytest.approx(1.5 * hours)


def test_infinite_figures_are_null_in_json() -> None:
    found = figures({"checkpoint.every_steps": 100_000}, Assumptions(gpus=16, gpu_hours_between_failures=1))
    assert (found["lost_hours"], found["days_with_losses"], found["cost"]) == (None, None, None)


def test_best_checkpoint_interval_is_within_the_run() -> None:
    found = figures({"train.tokens": "200M"})
    assert found["best_checkpoint_every_steps"] <= found["steps"]


def test_assumptions_list_defaults_only() -> None:
    assert "mfu" not in figures()["defaults"]
    assert figures(assumptions=Assumptions(gpus=16))["defaults"]["mfu"] == 0.5


def test_processes_share_one_cpu() -> None:
    cpu = replace(HARDWARE_SPECS["3090"], is_cpu=True)
    recipe = Recipe.load("demo")
    one, two = (estimate(recipe, 4096, cpu, Assumptions(gpus=count)).figures for count in (1, 2))
    assert two["tokens_per_second"] <= one["tokens_per_second"]


def test_muon_has_one_moment_per_matrix() -> None:
    adamw, muon = figures(), figures({"train.optimizer.name": "muon"})
    matrices = 207_618_048 + 761_266_176
    saved = adamw["memory_bytes_by_component"]["optimizer"] - muon["memory_bytes_by_component"]["optimizer"]
    assert saved == pytest.approx(4 * matrices / 16, abs=1)
    assert adamw["checkpoint_bytes"] - muon["checkpoint_bytes"] == 4 * matrices


@pytest.mark.parametrize("pattern", ["", "/**/*.txt"])
def test_store_size_is_estimated_from_raw_files(tmp_path: Path, pattern: str) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/a.txt").write_bytes(bytes(4000))
    (tmp_path / "deep/readme.md").write_bytes(bytes(999 * bool(pattern)))
    source = {"format": "text", "path": f"{tmp_path}{pattern}", "weight": 1}
    assert figures({"data.sources": {"mine": source}})["store_bytes"] == 2000


def test_existing_store_is_measured(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(b"{}")
    (tmp_path / "00000.tokens").write_bytes(bytes(1000))
    found = figures({"data.store": str(tmp_path)})
    assert (found["store_bytes"], found["store_bytes_from"]) == (1002, "its files")
