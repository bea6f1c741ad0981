"""Program that trains a model with a peer's trainer, or scores a saved model, for benchmarks/quality.py.

The program runs in the peer's environment and in the folder of the run: `quality_peers.py train|score PEER JOB.json`.
Training writes the time of each optimizer step to steps.txt. Scoring writes score.json. All programs share the scoring
function, which sees a model only as a function from token ids to logits.
"""

import json
import os
import runpy
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook
from training_peers import InOrder, litgpt_config, litgpt_data, load_rows, transformers_config

# ruff: noqa: PLC0415 - each peer is imported only where it runs

PADDING = -1
"""Value of targets after the end of a document."""
BATCH = 16
"""Windows per forward pass of the scoring."""
Loaded = tuple[torch.nn.Module, Callable[[Tensor], Tensor]]
"""A model, and the function that returns its logits [B, T, V] for ids int64 [B, T]."""


class StepTimes:
    """Writer of steps.txt: the time at the end of each optimizer step, in seconds since 1970."""

    def __init__(self) -> None:
        self.optimizer: torch.optim.Optimizer | None = None
        self.path = Path("steps.txt")
        self.path.write_text("")

    def __call__(self, optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        """Record a step of the first optimizer, which is not a wrapper, since a wrapper's step ends later."""
        self.optimizer = self.optimizer or optimizer
        if optimizer is self.optimizer:
            with self.path.open("a") as file:
                file.write(f"{time.time()}\n")


def train_transformers(job: dict[str, Any]) -> None:
    """Train a LlamaForCausalLM with the Trainer, and save it."""
    from transformers import LlamaForCausalLM, Trainer, TrainingArguments, set_seed

    arguments = TrainingArguments(
        output_dir="out",
        max_steps=job["steps"],
        seed=job["seed"],
        per_device_train_batch_size=job["batch_sequences"],
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        **job["arguments"],
    )
    set_seed(job["seed"])  # before the model is initialized, as in the examples of transformers
    model = LlamaForCausalLM(transformers_config(job))
    trainer = Trainer(model, arguments, train_dataset=InOrder(load_rows(job["rows"])))
    trainer.train()
    trainer.save_model("out/final")


def load_transformers(_job: dict[str, Any]) -> Loaded:
    """Load the model that the Trainer saved."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained("out/final", dtype=torch.float32).eval()
    return model, lambda ids: model(ids).logits


def train_litgpt(job: dict[str, Any]) -> None:
    """Train with the function of `litgpt pretrain`, which saves the model."""
    from litgpt.args import EvalArgs, TrainArgs
    from litgpt.pretrain import setup

    arguments = TrainArgs(
        global_batch_size=job["batch_sequences"],
        max_tokens=job["steps"] * job["batch_sequences"] * job["sequence_length"],
        max_seq_length=job["sequence_length"],
        max_norm=1.0,  # the default of `litgpt pretrain`
        tie_embeddings=job["tie_embeddings"],
        **job["arguments"],
    )
    sys.argv = ["litgpt", "small"]  # litgpt parses the command line when it saves the model
    torch.set_float32_matmul_precision("high")  # as in litgpt's command line
    setup(
        "small",
        litgpt_config(job),
        Path("out"),
        data=litgpt_data(job),
        train=arguments,
        eval=EvalArgs(interval=10**9, final_validation=False),
        optimizer=job["optimizer"],
        devices=1,
        logger_name="csv",
        seed=job["seed"],
    )


def load_litgpt(job: dict[str, Any]) -> Loaded:
    """Load the checkpoint that litgpt saved."""
    from litgpt.model import GPT

    model = GPT(litgpt_config(job))
    if job["tie_embeddings"]:
        model.transformer.wte.weight = model.lm_head.weight
    # not only weights: the checkpoint has the data loader too
    model.load_state_dict(torch.load("out/final/lit_model.pth", weights_only=False)["model"])
    return model.eval(), model


class Vocabulary:
    """Replacement of nanochat's tokenizer, of which training and loading use only the size."""

    def __init__(self, size: int) -> None:
        self.size = size

    def get_vocab_size(self) -> int:
        """Return the number of tokens."""
        return self.size


def prepare_nanochat(job: dict[str, Any], precision: str) -> None:
    """Configure nanochat's folder and precision, and replace its tokenizer, before its other modules are imported."""
    os.environ |= {"NANOCHAT_BASE_DIR": str(Path.cwd()), "NANOCHAT_DTYPE": precision}
    import nanochat.tokenizer

    nanochat.tokenizer.get_tokenizer = lambda: Vocabulary(job["vocab_size"])
    nanochat.tokenizer.get_token_bytes = lambda device: None


def train_nanochat(job: dict[str, Any]) -> None:
    """Run nanochat's scripts.base_train, with a data loader over the rows and the job's seed."""
    prepare_nanochat(job, job["precision"])
    import nanochat.common
    import nanochat.dataloader

    rows, compute_init = load_rows(job["rows"]), nanochat.common.compute_init

    def batches(_tokenizer: Any, size: int, *_args: Any, **_kwargs: Any) -> Iterator[tuple[Tensor, Tensor, Any]]:
        """Yield inputs and targets without end, because nanochat reads one micro-batch more than it uses."""
        while True:
            for batch in rows.split(size):
                yield batch[:, :-1], batch[:, 1:].contiguous(), {"pq_idx": 0, "rg_idx": 0, "epoch": 1}

    def seeded_init(device_type: str) -> Any:
        """Replace nanochat's fixed seed."""
        result = compute_init(device_type)
        torch.manual_seed(job["seed"])
        return result

    nanochat.dataloader.tokenizing_distributed_data_loader_with_state_bos_bestfit = batches
    nanochat.common.compute_init = seeded_init
    sys.argv = ["base_train", *job["arguments"], f"--num-iterations={job['steps']}"]
    runpy.run_module("scripts.base_train", run_name="__main__")


def load_nanochat(job: dict[str, Any]) -> Loaded:
    """Load nanochat's newest checkpoint in float32."""
    prepare_nanochat(job, "float32")
    from nanochat.checkpoint_manager import load_model

    model, _, _ = load_model("base", torch.device("cpu"), "eval")
    return model, model


def load_tinyllama(job: dict[str, Any]) -> Loaded:
    """Load the newest checkpoint of a run in float32."""
    from tinyllama.loading import load_model

    model = load_model(job["model"])
    return model, model


TRAIN = {"litgpt": train_litgpt, "transformers": train_transformers, "nanochat": train_nanochat}
LOAD = {
    "litgpt": load_litgpt,
    "transformers": load_transformers,
    "nanochat": load_nanochat,
    "tinyllama": load_tinyllama,
}


@torch.no_grad()
def nats_of(logits_of: Callable[[Tensor], Tensor], windows: Tensor) -> float:
    """Return the summed loss of the targets of windows, int64 [N, T + 1], in nats; PADDING is no target."""
    nats = 0.0
    for part in windows.split(BATCH):
        logits, targets = logits_of(part[:, :-1].clamp(min=0)), part[:, 1:]
        nats += F.cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), ignore_index=PADDING, reduction="sum"
        ).item()
    return nats


def main(action: str, name: str, job_file: str) -> None:
    """Train or score a model."""
    job = json.loads(Path(job_file).read_bytes())
    if action == "train":
        register_optimizer_step_post_hook(StepTimes())
        TRAIN[name](job)
        return
    model, logits_of = LOAD[name](job)
    nats = nats_of(logits_of, torch.from_numpy(np.load(job["windows"])))
    found = {"nats": nats, "num_parameters": sum(parameter.numel() for parameter in model.parameters())}
    Path("score.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
