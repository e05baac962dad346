"""The encoder with its heads as one model: what of it is trained, what it computes for labelled rows, what is kept.

Axis suffixes: `n` cells of a batch, `t` tokens of its stream, `r` labelled rows, `k` tokens that rows are read from,
`d` width, `c` outputs of all heads side by side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from genescale.platform.errors import SettingsError
from genescale.training.embedder import layers_to_run
from genescale.training.fitting.config import FinetuneConfig
from genescale.training.fitting.lora import add_low_rank, merged_state
from genescale.training.fitting.losses import weighted_loss_sum
from genescale.training.heads.head import LinearHead
from genescale.training.heads.spec import HeadSpec
from genescale.training.model import Encoder, PackedBatch
from genescale.training.weights import encoder_to_hf

ENCODER, HEADS = "encoder/", "heads/"


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelledBatch:
    """Cells that are computed together, and the labelled rows that are read from them."""

    packed: PackedBatch
    token_k: torch.Tensor
    """(k) int64 positions in the stream."""
    row_k: torch.Tensor
    """(k) int64: the row that each of them belongs to."""
    share_k: torch.Tensor
    """(k) float32: its share in the row's vector; the shares of a row make 1."""
    targets: tuple[torch.Tensor, ...]
    """One for each head, (r): codes or numbers; where there is none, 0."""
    weights: torch.Tensor
    """(heads, r) float32 weights in the loss; 0 where there is no target."""
    rows: np.ndarray
    """(r) their numbers among all rows; empty for an empty lane, whose single token weighs nothing."""
    dropout_seed: int = 0

    def to(self, device: torch.device | str) -> LabelledBatch:
        """The same batch on `device`."""

        def moved(values: torch.Tensor) -> torch.Tensor:
            return values.to(device, non_blocking=True)

        return LabelledBatch(
            packed=self.packed.to(device),
            token_k=moved(self.token_k),
            row_k=moved(self.row_k),
            share_k=moved(self.share_k),
            targets=tuple(moved(target_r) for target_r in self.targets),
            weights=moved(self.weights),
            rows=self.rows,
            dropout_seed=self.dropout_seed,
        )


class HeadedEncoder(nn.Module):
    """An encoder and the heads that read one of its layers; parts that are frozen stay in evaluation mode."""

    def __init__(self, encoder: Encoder, specs: Sequence[HeadSpec], config: FinetuneConfig) -> None:
        """Raises SettingsError when nothing of the encoder would be trained; draws the heads' first weights."""
        super().__init__()
        self.encoder = encoder
        self.layers = layers_to_run(specs[0].layer, encoder.config.layers)
        self.heads = nn.ModuleList(LinearHead(spec) for spec in specs)
        self._frozen = _thaw(encoder, config, self.layers)

    def train(self, mode: bool = True) -> HeadedEncoder:
        """As of any module, except that dropout stays away from what is frozen."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def vectors(self, batch: LabelledBatch) -> torch.Tensor:
        """What the heads read of each row, (r, d) float32."""
        hidden_td = self.encoder(batch.packed, layers=self.layers).float()
        shares_kd = hidden_td[batch.token_k] * batch.share_k[:, None]
        return hidden_td.new_zeros(batch.weights.shape[1], hidden_td.shape[1]).index_add(0, batch.row_k, shares_kd)

    def forward(self, batch: LabelledBatch) -> torch.Tensor:
        """Outputs of all heads side by side, (r, c) float32."""
        rows_rd = self.vectors(batch)
        with torch.autocast(rows_rd.device.type, enabled=False):
            return torch.cat([head(rows_rd) for head in self.heads], dim=1)


def check_trainable(config: FinetuneConfig, layers: int) -> None:
    """SettingsError when nothing of an encoder whose first `layers` layers are read would be trained."""
    trains_embeddings = config.encoder == "trained" and config.frozen_layers == 0
    if config.frozen_layers >= layers and not trains_embeddings:
        fix = f"Freeze at most {layers - 1} layers" if layers else "Read a later layer (layer = 'last')"
        raise SettingsError(
            f"with {config.frozen_layers} frozen layers nothing is left to train: the head reads layer {layers}.",
            where="frozen_layers" if layers else "layer",
            fix=f"{fix}, or keep the whole encoder frozen (encoder = 'frozen').",
        )


def _thaw(encoder: Encoder, config: FinetuneConfig, layers: int) -> list[nn.Module]:
    """Let only what is to be trained have gradients; gives the parts that stay as they are."""
    check_trainable(config, layers)
    encoder.requires_grad_(False)
    trained = list(encoder.layers[config.frozen_layers : layers])
    frozen: list[nn.Module] = list(encoder.layers[: config.frozen_layers])
    if config.encoder == "lora":
        add_low_rank(
            trained,
            matrices=config.lora_matrices,
            rank=config.lora_rank,
            alpha=config.lora_alpha,
            dropout=config.lora_dropout,
            seed=config.seed,
        )
        return [encoder.embeddings, *frozen]
    trained.append(encoder.norm)
    (trained if config.frozen_layers == 0 else frozen).append(encoder.embeddings)
    for module in trained:
        module.requires_grad_(True)
    return frozen


class LabelledRows:
    """The objective: the heads' losses at labelled rows, each row with its weight."""

    def __init__(self, model: HeadedEncoder, config: FinetuneConfig) -> None:
        self._heads: list[LinearHead] = list(model.heads)
        self._outputs = [head.spec.outputs for head in self._heads]
        self._smoothing = config.label_smoothing
        self._encoder_rate = config.encoder_learning_rate / config.learning_rate

    def loss(self, model: Any, micro_batch: LabelledBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Objective.loss`; correct are the rows of classes, by weight."""
        total = micro_batch.weights.new_zeros(())
        correct = torch.zeros_like(total)
        outputs = model(micro_batch).split(self._outputs, dim=1)
        for head, output_rc, target_r, weight_r in zip(
            self._heads, outputs, micro_batch.targets, micro_batch.weights, strict=True
        ):
            total = total + weighted_loss_sum(head, output_rc, target_r, weight_r, self._smoothing)
            if head.spec.kind != "number":
                correct += ((output_rc.argmax(1) == target_r) * weight_r).sum()
        return total, torch.stack([total.detach(), correct, micro_batch.weights.sum()])

    def measure(self, model: Any, micro_batch: LabelledBatch) -> torch.Tensor:
        """Outputs of the heads at every row, (r, c)."""
        outputs_rc: torch.Tensor = model(micro_batch)
        return outputs_rc

    def weights(self, model: nn.Module) -> dict[str, np.ndarray]:
        """`encoder/NAME` as in a bundle, low-rank additions merged, and `heads/NUMBER.NAME`."""
        assert isinstance(model, HeadedEncoder)
        encoder = encoder_to_hf(merged_state(model.encoder), model.encoder.config)
        heads = {name: value.detach().float().cpu().numpy().copy() for name, value in model.heads.state_dict().items()}
        kept = {f"{ENCODER}{name}": value for name, value in encoder.items()}
        return kept | {f"{HEADS}{name}": value for name, value in heads.items()}

    def rate_scale(self, parameter: str) -> float:
        """Heads learn at the full rate, the encoder at its own."""
        return 1.0 if parameter.startswith("heads.") else self._encoder_rate


def heads_from(weights: Mapping[str, np.ndarray], specs: Sequence[HeadSpec]) -> tuple[LinearHead, ...]:
    """The heads that `LabelledRows.weights` kept, in evaluation mode, on the CPU."""
    heads = []
    for number, spec in enumerate(specs):
        prefix = f"{HEADS}{number}."
        with torch.device("meta"):  # no weights are drawn
            head = LinearHead(spec)
        tensors = {name: torch.from_numpy(value) for name, value in weights.items() if name.startswith(prefix)}
        head.load_state_dict({name.removeprefix(prefix): value for name, value in tensors.items()}, assign=True)
        heads.append(head.eval())
    return tuple(heads)


def encoder_from(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The encoder's part of what `LabelledRows.weights` kept, by the names of a bundle."""
    return {name.removeprefix(ENCODER): value for name, value in weights.items() if name.startswith(ENCODER)}
