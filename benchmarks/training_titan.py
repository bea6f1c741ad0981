"""torchtitan's configuration of the shape in benchmarks/training.py, and the changes that it needs on a CPU.

torchtitan supports only accelerators and reads their memory statistics, so the device is replaced by the CPU. The
environment variable `TINYLLAMA_JOB` contains the job, because `--config` names a function without arguments.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch


def admit_cpu() -> None:
    """Make the CPU torchtitan's device, and replace two calls that gloo and torch.cpu do not support."""
    torch._utils._get_available_device_type = lambda: "cpu"
    from torchtitan.components import metrics  # noqa: PLC0415
    from torchtitan.distributed import utils  # noqa: PLC0415

    stats = dict.fromkeys(metrics.DeviceMemStats._fields, 0)
    monitor = SimpleNamespace(
        device_name="CPU", get_peak_stats=lambda: metrics.DeviceMemStats(**stats), reset_peak_stats=lambda: None
    )
    metrics.build_device_memory_monitor = lambda: monitor
    utils.set_pg_timeouts = lambda **_: None


def small() -> Any:
    """Return the configuration in the form of torchtitan's registries."""
    from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss  # noqa: PLC0415
    from torchtitan.components.metrics import MetricsProcessor  # noqa: PLC0415
    from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw  # noqa: PLC0415
    from torchtitan.config import CompileConfig, TrainingConfig  # noqa: PLC0415
    from torchtitan.trainer import Trainer  # noqa: PLC0415

    job = json.loads(os.environ["TINYLLAMA_JOB"])
    loss = CrossEntropyLoss.Config(global_vocab_size=job["vocab_size"])
    return Trainer.Config(
        model_spec=model_spec(job),
        loss=ChunkedLossWrapper.Config(loss_fn=loss) if job.get("loss") == "chunked" else loss,
        hf_assets_path=job["tokenizer"],
        dump_folder="out",
        optimizer=default_adamw(lr=job["learning_rate"]),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=2, decay_type="cosine", min_lr_factor=0.1),
        training=TrainingConfig(
            local_batch_size=job["batch_sequences"],
            seq_len=job["sequence_length"],
            steps=job["steps"],
            dtype="bfloat16" if job["precision"] == "bf16-true" else "float32",
            disable_cuda_graphs=True,
        ),
        dataloader=rows_config(job),
        metrics=MetricsProcessor.Config(log_freq=1),
        activation_checkpoint=None,
        compile=CompileConfig(enable=True),
    )


def model_spec(job: dict[str, Any]) -> Any:
    """Return a llama3 of the job's shape, with scaled_dot_product_attention: FlexAttention has no backward on a CPU."""
    from torchtitan.models import llama3  # noqa: PLC0415
    from torchtitan.models.common import ComplexRoPE, CosSinRoPE, Embedding, Linear, RMSNorm  # noqa: PLC0415
    from torchtitan.models.common.attention import ScaledDotProductAttention  # noqa: PLC0415

    if job.get("attention") == "math":
        ScaledDotProductAttention.sdpa_backends = [torch.nn.attention.SDPBackend.MATH]
    dim = job["dim"]
    rope = {"ComplexRoPE": ComplexRoPE, "CosSinRoPE": CosSinRoPE}[job.get("rope", "CosSinRoPE")]
    layers = llama3._build_llama3_layers(
        n_layers=job["layers"],
        dim=dim,
        n_heads=job["heads"],
        n_kv_heads=job["kv_heads"],
        hidden_dim=job["ffn_dim"],
        rope=rope.Config(dim=dim // job["heads"], max_seq_len=job["context_length"], theta=10000.0),
        attn_backend="flex",
    )
    for layer in layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    small = llama3.Llama3Model.Config(
        dim=dim,
        vocab_size=job["vocab_size"],
        tok_embeddings=Embedding.Config(
            num_embeddings=job["vocab_size"], embedding_dim=dim, param_init=llama3._EMBEDDING_INIT
        ),
        norm=RMSNorm.Config(normalized_shape=dim, param_init=llama3._NORM_INIT),
        lm_head=Linear.Config(
            in_features=dim, out_features=job["vocab_size"], param_init=llama3._output_linear_init(dim)
        ),
        layers=layers,
    )
    return llama3.ModelSpec(
        name="llama3",
        flavor="small",
        model=small,
        parallelize_fn=llama3.parallelize_llama,
        pipelining_fn=None,
        post_optimizer_build_fn=None,
        state_dict_adapter=None,
    )


def rows_config(job: dict[str, Any]) -> Any:
    """Return a data loader's configuration for the job's rows, in order."""
    from torchtitan.components.dataloader import BaseDataLoader  # noqa: PLC0415

    class Rows(BaseDataLoader):  # type: ignore[misc]
        @dataclass(kw_only=True, slots=True)
        class Config(BaseDataLoader.Config):  # type: ignore[misc]
            pass

        def __init__(self, config: Config, **_: Any) -> None:
            self.config = config

        def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
            rows = torch.from_numpy(np.load(job["rows"]).astype(np.int64))
            for batch in rows.split(job["batch_sequences"]):
                positions = torch.arange(batch.shape[1] - 1).expand(len(batch), -1)
                yield {"input": batch[:, :-1].contiguous(), "positions": positions}, batch[:, 1:].contiguous()

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            pass

    return Rows.Config()
