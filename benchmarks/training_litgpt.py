"""What `litgpt pretrain` takes by name from outside: a data module over given rows, and a fused AdamW.

litgpt sets fused=False on a CPU wherever an optimizer's constructor knows that word, and then loops over parameters.
"""

from collections.abc import Iterable

import numpy as np
import torch
from litgpt.data import DataModule
from torch.utils.data import DataLoader


class Rows(DataModule):
    """Batches of the rows of an .npy file, in their order."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self.batch_size = 1

    def connect(self, tokenizer: object = None, batch_size: int = 1, max_seq_length: int | None = None) -> None:
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader[torch.Tensor]:
        return self._loader(self._rows())

    def val_dataloader(self) -> DataLoader[torch.Tensor]:
        return self._loader(self._rows()[: self.batch_size])

    def _rows(self) -> torch.Tensor:
        return torch.from_numpy(np.load(self.path).astype(np.int64))

    def _loader(self, rows: torch.Tensor) -> DataLoader[torch.Tensor]:
        return DataLoader(list(rows), self.batch_size)  # type: ignore[arg-type]  # a list of rows is a data set


class FusedAdamW(torch.optim.AdamW):
    def __init__(
        self,
        params: Iterable[torch.nn.Parameter],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__(params, lr=lr, betas=(betas[0], betas[1]), weight_decay=weight_decay, fused=True)
