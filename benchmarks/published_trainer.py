"""The baseline: `transformers`' BertForMaskedLM under a Trainer-style loop, written from the published recipe.

The published pretraining (Theodoris et al., Nature 2023, and the script published with it) sorts cells by length in
mega-batches of 50 batches (`group_by_length`, the function of `transformers` itself is called here), pads each batch to
its longest cell, masks in the collator with probability 0.15 (80 % `<mask>`, 10 % any id, 10 % unchanged), and lets
`Trainer` do the rest: forward with an attention mask and labels, backward, clipping at 1, AdamW, linear schedule.

What is kinder to the baseline than the published way: attention is scaled_dot_product_attention and AdamW the fused
one (the defaults of today's `transformers`, not of then), cells come as NumPy arrays and not as Python lists from a
`datasets` table, and no loss is fetched from the device before the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from genescale.training.model import EncoderConfig
from genescale.training.optimizer import BETAS, EPSILON, OptimizerConfig

PAD, MASK, IGNORED = 0, 1, -100
SPECIAL = (PAD, MASK)
MASK_PROBABILITY = 0.15


def length_grouped(lengths: Sequence[int], batch_cells: int, *, seed: int) -> list[list[int]]:
    """Batches of neighbouring lengths, by the sampler of `transformers`, from the batch of longest cells on."""
    from transformers.trainer_pt_utils import get_length_grouped_indices

    order = get_length_grouped_indices(list(lengths), batch_cells, generator=torch.Generator().manual_seed(seed))
    return in_batches(order, batch_cells)


def shuffled(n_cells: int, batch_cells: int, *, seed: int) -> list[list[int]]:
    """Batches of cells in random order."""
    order = torch.randperm(n_cells, generator=torch.Generator().manual_seed(seed)).tolist()
    return in_batches(order, batch_cells)


def in_batches(order: Sequence[int], batch_cells: int) -> list[list[int]]:
    """Neighbours of `order` in batches; what does not fill one is left out."""
    return [list(order[at : at + batch_cells]) for at in range(0, len(order) - batch_cells + 1, batch_cells)]


def padded(cells: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """(b, s) int64 token ids padded on the right to the longest cell, and the attention mask."""
    longest = max(len(cell) for cell in cells)
    tokens = np.full((len(cells), longest), PAD, dtype=np.int64)
    for row, cell in zip(tokens, cells, strict=True):
        row[: len(cell)] = cell
    tokens_bs = torch.from_numpy(tokens)
    lengths = torch.tensor([len(cell) for cell in cells])
    return tokens_bs, (torch.arange(longest) < lengths[:, None]).long()


def mask_tokens(tokens_bs: torch.Tensor, vocabulary_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(inputs, labels) as `DataCollatorForLanguageModeling` draws them, from torch's global random state."""
    labels_bs, inputs_bs = tokens_bs.clone(), tokens_bs.clone()
    chance = torch.full(tokens_bs.shape, MASK_PROBABILITY)
    for token in SPECIAL:
        chance.masked_fill_(tokens_bs == token, 0.0)
    chosen = torch.bernoulli(chance).bool()
    labels_bs[~chosen] = IGNORED
    hidden = torch.bernoulli(torch.full(tokens_bs.shape, 0.8)).bool() & chosen
    inputs_bs[hidden] = MASK
    replaced = torch.bernoulli(torch.full(tokens_bs.shape, 0.5)).bool() & chosen & ~hidden
    inputs_bs[replaced] = torch.randint(vocabulary_size, tokens_bs.shape)[replaced]
    return inputs_bs, labels_bs


class PublishedTrainer:
    """A BertForMaskedLM with given weights, its optimiser, and the loop over batches."""

    def __init__(
        self,
        config: EncoderConfig,
        weights: Mapping[str, np.ndarray],
        optimizer: OptimizerConfig,
        *,
        total_steps: int,
        device: str = "cpu",
    ) -> None:
        self.config, self.device, self.total_steps, self.optimizer_config = config, device, total_steps, optimizer
        self.model = bert(config, weights).to(device).train()
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        vectors = [p for p in self.model.parameters() if p.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": optimizer.weight_decay}, {"params": vectors, "weight_decay": 0}]
        self.optimizer = torch.optim.AdamW(groups, lr=optimizer.learning_rate, betas=BETAS, eps=EPSILON, fused=True)
        self.steps = 0

    def train(self, cells: Sequence[np.ndarray], batches: Sequence[Sequence[int]]) -> torch.Tensor:
        """One optimiser step for each batch of cell numbers; the loss of each step, on the host."""
        losses = []
        for batch in batches:
            tokens_bs, attention_bs = padded([cells[number] for number in batch])
            losses.append(self.step(*mask_tokens(tokens_bs, self.config.vocabulary_size), attention_bs))
        return torch.stack(losses).cpu()

    def step(self, inputs_bs: torch.Tensor, labels_bs: torch.Tensor, attention_bs: torch.Tensor) -> torch.Tensor:
        """One optimiser step on a padded batch; its loss, on the device."""
        bf16 = self.optimizer_config.precision == "bf16"
        places = [x.to(self.device, non_blocking=True) for x in (inputs_bs, attention_bs, labels_bs)]
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=bf16):
            loss = self.model(input_ids=places[0], attention_mask=places[1], labels=places[2]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.optimizer_config.clip)
        self.steps += 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.optimizer_config.rate_at(self.steps, self.total_steps)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def weights(self) -> dict[str, np.ndarray]:
        """Weights under their names, as a checkpoint would hold them."""
        return {name: tensor.detach().cpu().numpy() for name, tensor in self.model.state_dict().items()}


def bert(config: EncoderConfig, weights: Mapping[str, np.ndarray]) -> Any:
    """BertForMaskedLM of this shape with these weights."""
    import transformers

    model = transformers.BertForMaskedLM(transformers.BertConfig(**config.to_hf()))
    tensors = {name: torch.from_numpy(np.array(values)) for name, values in weights.items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    # The decoder is tied to the embedding and is not in a checkpoint.
    wrong = [name for name in missing if not name.startswith("cls.predictions.decoder.")]
    if wrong or unexpected:
        raise ValueError(f"weights do not fit: missing {wrong}, unexpected {unexpected}")
    return model
