"""Program that runs a peer's trainer on given rows and writes metrics per step, for benchmarks/training.py.

The program runs in the peer's environment: `training_peers.py litgpt|transformers|torchtitan JOB.json`. torch calls a
hook after every optimizer step of any trainer. The time of a step is the time between two calls of the hook. Every few
steps, the hook also measures a bf16 2048^3 matrix product (the best of three); the time of this measurement is
excluded. The hook refuses a model whose number of parameters differs from that in the job.
"""

import json
import math
import os
import resource
import socket
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader, IterableDataset

# ruff: noqa: PLC0415 - each peer is imported only where it runs

PRODUCT_SIZE = 2048
TIMING_SHARE = 0.02  # maximum fraction of the time for timed matrix products, as in tinyllama


class Meter:
    """Writer of metrics.jsonl in the format of `tinyllama train`."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        self.step = 0
        self.begun, self.peak, self.next_timing = math.nan, 0.0, 0.0
        self.path = Path("metrics.jsonl")
        self.path.write_text("")

    def __call__(self, optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        """Record an optimizer step; wrappers of the real optimizer are ignored."""
        if not isinstance(optimizer, torch.optim.AdamW):
            return
        now = time.perf_counter()
        if self.step == 0:
            self._check_size(optimizer)
            Path("first-step").touch()
        else:
            self._write(now - self.begun)
        if self.step % self.job["product_every_steps"] == 0 and now >= self.next_timing:
            self.peak = max(self.peak, measure_product())
            self.next_timing = time.perf_counter() + (time.perf_counter() - now) / TIMING_SHARE
        self.step += 1
        self.begun = time.perf_counter()

    def _check_size(self, optimizer: torch.optim.Optimizer) -> None:
        size = sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])
        if size != self.job["num_parameters"]:
            raise SystemExit(f"the model has {size:,} parameters instead of {self.job['num_parameters']:,}")

    def _write(self, seconds: float) -> None:
        speed = self.job["batch_sequences"] * self.job["sequence_length"] / seconds
        row = {
            "step": self.step + 1,
            "tokens_per_second": speed,
            "mfu": speed * self.job["flops_per_token"] / self.peak,
            "memory_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        }
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def measure_product() -> float:
    """Return the FLOP/s of a square bf16 matrix product, the best of three."""
    left, right = torch.ones(2, PRODUCT_SIZE, PRODUCT_SIZE, dtype=torch.bfloat16)
    best = math.inf
    for _ in range(3):
        begun = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - begun)
    return 2 * PRODUCT_SIZE**3 / best


def load_rows(path: str) -> torch.Tensor:
    """Return the rows, int64 [rows, sequence_length + 1]."""
    return torch.from_numpy(np.load(path).astype(np.int64))


def run_transformers(job: dict[str, Any]) -> None:
    """Train a LlamaForCausalLM with the Trainer."""
    from transformers import LlamaForCausalLM, Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir="out",
        max_steps=job["steps"],
        per_device_train_batch_size=job["batch_sequences"],
        learning_rate=job["learning_rate"],
        warmup_steps=2,
        lr_scheduler_type="cosine",
        weight_decay=0.1,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        bf16=job["precision"] == "bf16-mixed",
        torch_compile=True,
        torch_compile_mode=job.get("compile_mode"),
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    model = LlamaForCausalLM(transformers_config(job))
    if job["precision"] == "bf16-true":
        model.to(torch.bfloat16)
    Trainer(model, arguments, train_dataset=InOrder(load_rows(job["rows"]))).train()


def transformers_config(job: dict[str, Any]) -> Any:
    """Return the LlamaConfig of the job's shape."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=job["vocab_size"],
        hidden_size=job["dim"],
        intermediate_size=job["ffn_dim"],
        num_hidden_layers=job["layers"],
        num_attention_heads=job["heads"],
        num_key_value_heads=job["kv_heads"],
        max_position_embeddings=job["context_length"],
        rms_norm_eps=1e-5,
        tie_word_embeddings=job["tie_embeddings"],
        use_cache=False,
        attn_implementation=job.get("attention", "sdpa"),
    )


class InOrder(IterableDataset[Any]):
    """Dataset for a Trainer that yields rows in order, since a Trainer would shuffle them."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = [{"input_ids": row[:-1], "labels": row[:-1]} for row in rows]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)


def run_litgpt(job: dict[str, Any]) -> None:
    """Train with the function of `litgpt pretrain`, with a data module over the rows."""
    from litgpt.args import EvalArgs, TrainArgs
    from litgpt.pretrain import setup

    arguments = TrainArgs(
        save_interval=None,
        global_batch_size=job["batch_sequences"],
        micro_batch_size=job["batch_sequences"],
        max_tokens=job["steps"] * job["batch_sequences"] * job["sequence_length"],
        max_norm=1.0,
        min_lr=job["learning_rate"] / 10,
        lr_warmup_steps=2,
        tie_embeddings=False,
    )
    optimizer = {
        "class_path": job.get("optimizer", "training_peers.FusedAdamW"),
        "init_args": {"lr": job["learning_rate"], "betas": (0.9, 0.95), "weight_decay": 0.1},
    }
    sys.argv = ["litgpt", "small"]  # litgpt parses the command line when it saves the model
    torch.set_float32_matmul_precision("high")  # as in litgpt's command line
    setup(
        "small",
        litgpt_config(job),
        Path("out"),
        job["precision"],
        data=litgpt_data(job),
        train=arguments,
        eval=EvalArgs(interval=10**9),
        optimizer=optimizer,
        devices=1,
        logger_name="csv",
    )


def litgpt_config(job: dict[str, Any]) -> Any:
    """Return litgpt's Config of the job's shape."""
    from litgpt.config import Config

    return Config(
        name="small",
        block_size=job["context_length"],
        vocab_size=job["vocab_size"],
        padded_vocab_size=job["vocab_size"],
        n_layer=job["layers"],
        n_head=job["heads"],
        n_query_groups=job["kv_heads"],
        n_embd=job["dim"],
        intermediate_size=job["ffn_dim"],
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=1e-5,
        mlp_class_name="LLaMAMLP",
    )


def litgpt_data(job: dict[str, Any]) -> Any:
    """Return a data module of litgpt that yields the rows in order; validation reads the first micro-batch."""
    from litgpt.data import DataModule

    class Rows(DataModule):  # type: ignore[misc]
        def connect(self, tokenizer: Any = None, batch_size: int = 1, max_seq_length: int | None = None) -> None:
            self.rows: Any = list(load_rows(job["rows"]))
            self.batch_size = batch_size

        def train_dataloader(self) -> Any:
            return DataLoader(self.rows, self.batch_size)

        def val_dataloader(self) -> Any:
            return DataLoader(self.rows[: self.batch_size], self.batch_size)

    return Rows()


class FusedAdamW(torch.optim.AdamW):
    """AdamW whose constructor hides `fused`: litgpt sets it to False on a CPU, which is slower."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], weight_decay: float) -> None:
        super().__init__(params, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)


def run_torchtitan(job: dict[str, Any]) -> None:
    """Train a llama3 of the job's shape with `torchtitan.train`, as one gloo rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "TINYLLAMA_JOB": json.dumps(job)}
    import training_titan

    training_titan.admit_cpu()
    from torchtitan.train import main

    sys.argv = ["torchtitan", "--module", "training_titan", "--config", "small"]
    main()


def main(name: str, job_file: str) -> None:
    """Run a peer with the measuring hook."""
    job = json.loads(Path(job_file).read_bytes())
    print(", ".join(f"{package} {version(package)}" for package in (name, "torch")), flush=True)
    register_optimizer_step_post_hook(Meter(job))
    torch.backends.cuda.enable_flash_sdp(job.get("attention") != "math")  # effective on a CPU too
    runners = {"litgpt": run_litgpt, "transformers": run_transformers, "torchtitan": run_torchtitan}
    runners[name](job)


if __name__ == "__main__":
    main(*sys.argv[1:])
