"""Published zero-shot scores that a model is read beside: as their sources print them, not measured here."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Baseline:
    """One row of a published table; scores are percentages."""

    name: str
    tokens: int
    """Tokens that the model was trained on."""
    hellaswag_acc_norm: float
    mean_of_seven: float | None
    """Over HellaSwag, OpenBookQA, WinoGrande, ARC-c, ARC-e, BoolQ, PIQA; None where the source has none."""
    source: str


_FIRST_CARD = "model card of TinyLlama-1.1B-step-50K-105b"
_EVALUATIONS = "EVAL.md of github.com/jzhang38/TinyLlama"
_LAST_CARD = "model card of TinyLlama-1.1B-intermediate-step-1431k-3T"

PUBLISHED = (
    Baseline("StableLM-Alpha-3B", 800 * 10**9, 38.31, None, _FIRST_CARD),
    Baseline("Pythia-1B", 105 * 10**9, 42.04, None, _FIRST_CARD),
    Baseline("Pythia-1B", 300 * 10**9, 47.16, 48.30, _EVALUATIONS),
    Baseline("TinyLlama-1.1B step 50k", 105 * 10**9, 43.50, 46.11, _EVALUATIONS),
    Baseline("TinyLlama-1.1B step 240k", 503 * 10**9, 49.56, 48.28, _EVALUATIONS),
    Baseline("TinyLlama-1.1B step 480k", 1000 * 10**9, 52.54, 50.22, _EVALUATIONS),
    Baseline("TinyLlama-1.1B step 715k", 1500 * 10**9, 53.68, 51.29, _LAST_CARD),
    Baseline("TinyLlama-1.1B step 955k", 2000 * 10**9, 54.63, 51.64, _LAST_CARD),
    Baseline("TinyLlama-1.1B step 1195k", 2500 * 10**9, 58.96, 53.86, _LAST_CARD),
    Baseline("TinyLlama-1.1B step 1431k", 3000 * 10**9, 59.20, 52.99, _LAST_CARD),
)
"""Other models first, then TinyLlama's checkpoints in the order of their tokens."""
