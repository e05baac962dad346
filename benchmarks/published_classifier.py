"""The baseline of fine-tuning: `transformers`' BertForSequenceClassification under a Trainer-style loop.

Written from the published recipe (Theodoris et al., Nature 2023, and the `Classifier` published with it): a batch is
padded to its longest cell, the pooled first position goes through a tanh layer and a linear classifier, the first
layers may be frozen, AdamW with a linear schedule, clipping at 1, and the encoder runs in every epoch of every fit,
frozen or not. Kinder to it than the published way: all that is in `published_trainer.py`, and with frozen layers the
embeddings are frozen too, so that nothing is computed backwards below the first layer that learns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from published_trainer import padded

from genescale.training.model import EncoderConfig
from genescale.training.optimizer import BETAS, EPSILON

CLIP = 1.0


class PublishedClassifier:
    """A BertForSequenceClassification with given encoder weights, its optimiser, and the loop over batches."""

    def __init__(
        self,
        config: EncoderConfig,
        weights: Mapping[str, np.ndarray],
        *,
        classes: int,
        frozen_layers: int,
        learning_rate: float,
        total_steps: int,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        self.device, self.total_steps, self.learning_rate = device, total_steps, learning_rate
        self.model = classifier(config, weights, classes, seed).to(device).train()
        freeze(self.model, frozen_layers)
        learned = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            learned, lr=learning_rate, betas=BETAS, eps=EPSILON, weight_decay=0.001, fused=True
        )
        self.learned, self.steps = learned, 0

    def train(self, cells: Sequence[np.ndarray], codes: np.ndarray, batches: Sequence[Sequence[int]]) -> torch.Tensor:
        """One optimiser step for each batch of cell numbers; the loss of each step, on the host."""
        losses = []
        for batch in batches:
            tokens_bs, attention_bs = (x.to(self.device) for x in padded([cells[number] for number in batch]))
            labels_b = torch.from_numpy(codes[list(batch)]).to(self.device)
            loss = self.model(input_ids=tokens_bs, attention_mask=attention_bs, labels=labels_b).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.learned, CLIP)
            self.steps += 1
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate * max(0.0, 1 - self.steps / self.total_steps)
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(loss.detach())
        return torch.stack(losses).cpu()

    @torch.no_grad()
    def predict(self, cells: Sequence[np.ndarray], batch_cells: int) -> np.ndarray:
        """The most likely class of each cell."""
        self.model.eval()
        found = []
        for start in range(0, len(cells), batch_cells):
            tokens_bs, attention_bs = (x.to(self.device) for x in padded(cells[start : start + batch_cells]))
            found.append(self.model(input_ids=tokens_bs, attention_mask=attention_bs).logits.argmax(-1).cpu().numpy())
        self.model.train()
        return np.concatenate(found)


def classifier(config: EncoderConfig, weights: Mapping[str, np.ndarray], classes: int, seed: int) -> Any:
    """BertForSequenceClassification of this shape on an encoder with these weights; pooler and classifier are new."""
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.BertForSequenceClassification(
            transformers.BertConfig(**{**config.to_hf(), "num_labels": classes})
        )
    tensors = {name: torch.from_numpy(np.array(v)) for name, v in weights.items() if name.startswith("bert.")}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    wrong = [name for name in missing if not name.startswith(("bert.pooler.", "classifier."))]
    if wrong or unexpected:
        raise ValueError(f"weights do not fit: missing {wrong}, unexpected {unexpected}")
    return model


def freeze(model: Any, layers: int) -> None:
    """Freeze the first `layers` encoder layers, and the embeddings below them."""
    for module in (model.bert.embeddings, *model.bert.encoder.layer[:layers]) if layers else ():
        module.requires_grad_(False)
