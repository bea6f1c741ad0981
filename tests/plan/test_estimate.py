"""The plan reproduces what the original TinyLlama published, and says what it takes for granted."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tinyllama.cli import main
from tinyllama.errors import InputError
from tinyllama.hardware import HARDWARE_SPECS, spec_for_device
from tinyllama.plan import command
from tinyllama.plan.estimate import Assumptions, estimate
from tinyllama.plan.failures import failure_overhead
from tinyllama.recipe import Recipe

PUBLISHED = Assumptions(gpus=16, mfu=0.563, formula="full", price_per_gpu_hour=1.5)


def figures(fields: dict[str, object] | None = None, stated: Assumptions = PUBLISHED) -> dict[str, Any]:
    return estimate(Recipe.load("tinyllama-1.1b", fields), 32_000, HARDWARE_SPECS["a100-40g"], stated).as_json()


def test_the_published_figures_come_out() -> None:
    found = figures()
    assert found["parameters"] == 1_100_048_384
    assert found["tokens_per_second_per_gpu"] == pytest.approx(24_000, rel=0.01)
    assert found["days"] == pytest.approx(90, rel=0.01)
    assert found["store_bytes"] == pytest.approx(1.8e12, rel=0.01)
    by_formula = {name: round(100 * share, 1) for name, share in found["mfu_by_formula"].items()}
    assert by_formula == {"causal": 52.0, "full": 56.3, "6N": 50.8, "6N+full": 59.3}
    assert figures({"train.tokens": "300B"})["gpu_hours"] == pytest.approx(3456, rel=0.01)


def test_16k_tokens_fit_in_40_gigabytes_without_checkpointing() -> None:
    found = figures()
    assert found["micro_batch_sequences"] * 2048 == 16_384
    assert found["memory_fits"]
    assert found["largest_micro_batch_sequences"] == 8


def test_weights_gradients_and_moments_are_shared_out() -> None:
    parts = figures()["memory_bytes_by_component"]
    shares = {"weights": 4, "gradients": 4, "optimizer": 8}
    assert {name: round(16 * parts[name] / 1_100_048_384) for name in shares} == shares


def test_float32_is_planned_with_float32_products() -> None:
    bf16, fp32 = figures(), figures({"train.precision": "fp32"})
    assert fp32["tokens_per_second_per_gpu"] / bf16["tokens_per_second_per_gpu"] == pytest.approx(19.5 / 312)


def test_a_wide_ring_s_steps_are_waited_for_and_hybrid_sharding_spares_them() -> None:
    fields: dict[str, object] = {"train.batch_sequences": 4096}
    stated = Assumptions(gpus=4096)
    assert not figures(fields, stated)["network_hides"]
    assert figures(fields | {"parallel.replicate": 512}, stated)["network_hides"]


def test_cost_and_energy_count_the_hours_that_failures_take() -> None:
    found = figures()
    hours = 24 * 16 * found["days_with_losses"]
    assert hours > found["gpu_hours"]
    assert found["cost"] == pytest.approx(1.5 * hours)
    assert found["energy_kilowatt_hours"] == pytest.approx(0.4 * hours)


def test_a_run_that_fails_before_every_checkpoint_never_ends() -> None:
    seldom = Assumptions(gpus=16, gpu_hours_between_failures=1)
    found = figures({"checkpoint.every_steps": 100_000}, seldom)
    assert (found["lost_hours"], found["days_with_losses"], found["energy_kilowatt_hours"]) == (None, None, None)


def test_no_interval_is_longer_than_the_run() -> None:
    found = figures({"train.tokens": "200M"})
    assert found["best_checkpoint_every_steps"] <= found["steps"]


def test_what_was_left_at_its_default_is_named() -> None:
    assert "mfu" not in figures()["assumptions"]
    assert figures(stated=Assumptions(gpus=16))["assumptions"]["mfu"] == 0.5


def test_a_cpu_s_processes_share_it() -> None:
    cpu = replace(HARDWARE_SPECS["3090"], is_cpu=True)
    recipe = Recipe.load("demo")
    one, two = (estimate(recipe, 4096, cpu, Assumptions(gpus=count)).figures for count in (1, 2))
    assert two["tokens_per_second"] <= one["tokens_per_second"]


def test_muon_keeps_one_moment_of_the_matrices() -> None:
    adamw, muon = figures(), figures({"train.optimizer.name": "muon"})
    matrices = 207_618_048 + 761_266_176
    saved = adamw["memory_bytes_by_component"]["optimizer"] - muon["memory_bytes_by_component"]["optimizer"]
    assert saved == pytest.approx(4 * matrices / 16, abs=1)
    assert adamw["checkpoint_bytes"] - muon["checkpoint_bytes"] == 4 * matrices


def test_hybrid_sharding_spares_a_slow_network() -> None:
    whole, hybrid = (
        estimate(
            Recipe.load("tinyllama-1.1b", {"parallel.replicate": n}), 32_000, HARDWARE_SPECS["l40s"], PUBLISHED
        ).figures
        for n in (1, 2)
    )
    assert hybrid["memory_bytes_by_component"]["weights"] == pytest.approx(4 * 1_100_048_384 / 8, abs=1)
    assert hybrid["network_seconds_per_step"] < whole["network_seconds_per_step"]


def test_a_slow_network_is_waited_for() -> None:
    slow = estimate(
        Recipe.load("tinyllama-1.1b", {"train.micro_batch_sequences": 1}),
        32_000,
        HARDWARE_SPECS["4090"],
        Assumptions(gpus=64),
    ).figures
    assert not slow["network_hides"]
    assert slow["mfu"] < 0.5
    assert slow["step_seconds"] == pytest.approx(slow["network_seconds_per_step"])


def test_the_best_interval_loses_least() -> None:
    def lost(interval: float) -> float:
        return failure_overhead(1000, 512, interval, 30, 10, 50_000, 300).lost_hours

    best = failure_overhead(1000, 512, 3600, 30, 10, 50_000, 300)
    assert lost(3600) == pytest.approx(best.expected_failures * (1800 + 300) / 3600 + 1000 * 30 / 3600, rel=0.03)
    assert best.expected_failures == pytest.approx(1000 * 512 / 50_000)
    assert best.lost_hours_at_best == pytest.approx(lost(best.best_interval_seconds))
    assert best.lost_hours_at_best < min(lost(0.7 * best.best_interval_seconds), lost(1.4 * best.best_interval_seconds))


def test_files_are_found_as_prepare_finds_them(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/a.txt").write_bytes(bytes(4000))
    (tmp_path / "deep/readme.md").write_bytes(bytes(999))
    source = {"format": "text", "path": f"{tmp_path}/**/*.txt", "weight": 1}
    assert figures({"data.sources": {"mine": source}})["store_bytes"] == 2000


def test_a_store_that_is_there_is_measured(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "manifest.json").write_bytes(b"{}")
    (tmp_path / "store" / "00000.tokens").write_bytes(bytes(1000))
    found = figures({"data.store": str(tmp_path / "store")})
    assert (found["store_bytes"], found["store_bytes_from"]) == (1002, "its files")


def test_own_text_is_estimated_from_its_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(bytes(4000))
    fields: dict[str, object] = {"data.sources": {"mine": {"format": "text", "path": str(tmp_path), "weight": 1}}}
    assert figures(fields)["store_bytes"] == 2000


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("NVIDIA A100-SXM4-40GB", "a100-40g"),
        ("NVIDIA A100-SXM4-80GB", "a100-80g"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("NVIDIA GeForce RTX 3090", "3090"),
    ],
)
def test_a_gpu_is_known_by_its_driver_s_name(name: str, row: str) -> None:
    assert spec_for_device(name) is HARDWARE_SPECS[row]


def test_an_unknown_gpu_has_no_row() -> None:
    assert spec_for_device("NVIDIA T4") is None


def test_planning_needs_no_torch() -> None:
    program = "import sys, tinyllama.plan.command; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_the_command_prints_every_key_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "tinyllama-1.1b", "--hardware", "h100", "--gpus", "8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    wanted = "parameters flops_per_token memory_bytes_per_gpu tokens_per_second_per_gpu days gpu_hours store_bytes"
    assert set(wanted.split()) <= set(found)


def test_the_tables_name_the_formula_and_the_source(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "tinyllama-1.1b", "--hardware", "a100-40g", "--gpus", "16", "--price", "1.5"]) == 0
    said = capsys.readouterr().out
    for words in (
        "6 x (parameters less the input embedding)",
        "data sheet",
        "GPU-hours",
        "fits",
        "hides",
        "1,100,048,384",
    ):
        assert words in said


def test_a_sweep_is_printed_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "sweep.png"
    command = ["plan", "tinyllama-1.1b", "--hardware", "h100", "--sweep", "gpus=8,64,4096", "--plot", str(picture)]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "4,096 GPUs: train.batch_sequences: 1024 rows do not divide among 4096 ranks" in said
    assert "such as --train.batch_sequences 4096" in said
    assert picture.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--hardware", "h1000"], "--hardware h1000: unknown; name one of a100-40g"),
        (["--gpus", "0"], "--gpus 0: give how many there are"),
        (["--failure-hours", "inf"], "--failure-hours inf: give GPU-hours"),
        (["--disk", "1e-300"], "--disk 1e-300: give bytes a second"),
        (["--price", "nan"], "--price nan: give an amount"),
        (["--vocab-size", "-5"], "--vocab-size -5: give a number of pieces"),
        (["--sweep", "gpus=²"], "--sweep gpus=²: give numbers of GPUs"),
        (["--sweep", "gpus=8", "--hardware", "h100", "--plot", "/"], "--plot /: give a file"),
        (["--mfu", "56"], "--mfu 56.0: give a share such as 0.5"),
        (["--sweep", "nodes=2"], "--sweep nodes=2: give numbers of GPUs"),
        (["--gpus", "3", "--hardware", "h100"], "1024 rows do not divide among 3 ranks"),
        (["--gpus", "16", "--parallel.replicate", "3", "--hardware", "h100"], "do not make 16 ranks"),
    ],
)
def test_wrong_input_is_one_line(flags: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "tinyllama-1.1b", *flags]) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert words in line


def test_measuring_this_machine_plans_its_speed(capsys: pytest.CaptureFixture[str]) -> None:
    shape = "{dim: 64, layers: 4, heads: 2, kv_heads: 1, ffn_dim: 128, context_length: 64}"
    fields = ["--model", shape, "--train.sequence_length", "64", "--train.compile", "false"]
    assert main(["plan", "demo", *fields, "--hardware", "cpu", "--measure", "--vocab-size", "512", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    micro, update = found["stated"]["measured_seconds"]
    assert found["step_seconds"] == pytest.approx(micro + update)
    assert found["tokens_per_second_per_gpu"] == pytest.approx(32 * 64 / found["step_seconds"])
    assert 0 < found["mfu"] < 1


@pytest.mark.parametrize("measured", [False, True])
def test_a_gpu_that_the_plan_does_not_know_can_be_replaced_but_not_measured(
    monkeypatch: pytest.MonkeyPatch, measured: bool
) -> None:
    monkeypatch.setattr("tinyllama.plan.measure.this_machine", lambda: None)
    with pytest.raises(InputError, match="not in the table") as error:
        command._machine(Recipe.load("demo"), "h100" if measured else None, Assumptions(), measured, 512)
    assert ("leave out --measure" in str(error.value)) == measured
