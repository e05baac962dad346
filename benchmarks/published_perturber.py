"""The baseline of perturbation: `transformers`' BertForMaskedLM under the published way of deleting every gene.

Written from the published code's way of working (Theodoris et al., Nature 2023, and the `InSilicoPerturber` published
with it). For each cell in turn:

- a `datasets` table gets one copy of the cell for each of its genes, and `map` deletes one gene from each copy;
- copies are padded and go through the whole masked-gene model in batches, with an attention mask, and it returns the
  vocabulary logits of every token and the hidden states of every layer, of which one layer is kept;
- the kept embeddings of all copies, and the unedited cell's without the deleted gene once for each copy, are stacked;
- cosines are taken row by row, and averaged over the remaining genes.

What is kinder to it than the published code: attention is scaled_dot_product_attention (the default of today's
`transformers`), nothing is copied between processes or written to disk, no progress bars, no garbage collection between
batches, and its batch is small enough for the memory at hand (the published 100 copies of 1,000 tokens would need 10 GB
for the logits alone). `datasets` has changed since: where the published code fails with the release that is installed,
this one takes plain lists from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from published_trainer import PAD, bert

from genescale.training.model import EncoderConfig

# Counted from the end, as published: 0 is the last encoder layer.
LAYER = -1


class PublishedPerturber:
    """A BertForMaskedLM with given weights, and the loop over the copies of a cell."""

    def __init__(
        self, config: EncoderConfig, weights: Mapping[str, np.ndarray], *, batch_cells: int, device: str = "cpu"
    ) -> None:
        import datasets

        datasets.disable_progress_bars()
        self.batch_cells, self.device = batch_cells, device
        self.model = bert(config, weights).to(device).eval()
        self.model.config.output_hidden_states = True

    def delete_each(self, cell: np.ndarray, positions: Sequence[int]) -> np.ndarray:
        """(p) float64: mean cosine of the remaining genes after the gene at each position is deleted, one at a time."""
        original_1td = self.embeddings(_table([cell.tolist()]))
        copies = self.copies(cell, positions)
        edited_ptd = self.embeddings(copies)
        compared_ptd = torch.cat(
            [torch.cat([original_1td[:, :at], original_1td[:, at + 1 :]], dim=1) for at in positions]
        )
        cosines_pt = torch.nn.CosineSimilarity(dim=2)(edited_ptd, compared_ptd)
        return cosines_pt.mean(dim=1).double().cpu().numpy()

    def copies(self, cell: np.ndarray, positions: Sequence[int]) -> Any:
        """A table of copies of the cell, each without the gene at one position."""
        table = _table([cell.tolist()] * len(positions)).add_column("perturb_index", list(positions))
        return table.map(_without, load_from_cache_file=False)

    @torch.no_grad()
    def embeddings(self, table: Any) -> torch.Tensor:
        """(p, t, d) of one layer, padded to the longest cell of the table."""
        kept = []
        for start in range(0, len(table), self.batch_cells):
            batch = table.select(range(start, min(start + self.batch_cells, len(table))))
            lengths = torch.tensor(list(batch["length"]))
            longest = int(lengths.max())
            rows = [row + [PAD] * (longest - len(row)) for row in batch["input_ids"]]
            mask = (torch.arange(longest) < lengths[:, None]).long()
            outputs = self.model(input_ids=torch.tensor(rows).to(self.device), attention_mask=mask.to(self.device))
            kept.append(outputs.hidden_states[LAYER - 1])
            del outputs
        return torch.cat(kept)


def _table(rows: list[list[int]]) -> Any:
    import datasets

    return datasets.Dataset.from_dict({"input_ids": rows, "length": [len(row) for row in rows]})


def _without(example: dict[str, Any]) -> dict[str, Any]:
    at = example["perturb_index"]
    example["input_ids"] = example["input_ids"][:at] + example["input_ids"][at + 1 :]
    example["length"] = len(example["input_ids"])
    return example
