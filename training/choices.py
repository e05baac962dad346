"""What can be read from a model, by name: for code that checks a choice without loading torch."""

from __future__ import annotations

from typing import Literal, get_args

Layer = Literal["last", "second_to_last"]
Pooling = Literal["mean_genes", "cls"]
# Imported classifiers of vocabularies without <cls> read the first gene, so there is one more than can be asked for.
HeadPooling = Literal["mean_genes", "cls", "first_token"]
LAYERS: tuple[Layer, ...] = get_args(Layer)
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)
Precision = Literal["float32", "float16", "bfloat16"]
TOKENS_PER_BATCH = 8_192
