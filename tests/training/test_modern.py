"""Encoders with options of their own: the same promises as the published one, and what each option means."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from genescale.platform.bundle import Bundle, open_bundle, write_bundle
from genescale.platform.errors import InputError, IntegrityError, SettingsError
from genescale.platform.vocabulary import Vocabulary
from genescale.training.attention import Segments
from genescale.training.embedder import Embedder, Layer
from genescale.training.encoder_config import OPTION_NAMES, EncoderConfig
from genescale.training.flops import Work, training_flops
from genescale.training.model import SEEN_AMOUNT, MaskedGeneModel, new_model, pack, seen_elsewhere
from genescale.training.published import export_checkpoint
from genescale.training.ranks import RankKnots, RankNeighbours, Ranks, turned
from genescale.training.recipe import read_recipe
from genescale.training.weights import encoder_from_hf, from_hf, load_encoder, load_model, to_hf

LENGTHS = (9, 1, 20, 9, 14)
# One value of each option that is not the published one.
OPTIONS = {
    "norm": "pre", "activation": "geglu", "biases": False, "rank_knots": 5, "rotary_base": 100.0, "rank_neighbours": 2,
    "query_key_norm": True, "attention_width": 8, "seen_genes": True,
}  # fmt: skip


def config_of(**changes: object) -> EncoderConfig:
    values = {"vocabulary_size": 50, "width": 16, "layers": 3, "heads": 2, "feed_forward": 32, "positions": 20}
    return EncoderConfig(**{**values, "initializer_range": 0.3, **changes})  # type: ignore[arg-type]


def model_of(config: EncoderConfig, *, attention: str = "auto") -> MaskedGeneModel:
    """A model whose every weight counts: what begins at zero or one is moved away from it."""
    model = new_model(config, seed=0, attention=attention)
    draws = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1 or not parameter.any():
                parameter.add_(torch.randn(parameter.shape, generator=draws) * 0.3)
        for layer in model.encoder.layers:
            if layer.neighbours is not None:
                layer.neighbours.weight.normal_(0.0, 0.3, generator=draws)
    return model.eval()


def variants() -> list[dict[str, object]]:
    return [{name: value} for name, value in OPTIONS.items()] + [OPTIONS]


def named(variant: dict[str, object]) -> str:
    return next(iter(variant)) if len(variant) == 1 else "all"


each_variant = pytest.mark.parametrize("options", variants(), ids=named)


@pytest.fixture(scope="module")
def cells() -> list[np.ndarray]:
    draws = np.random.default_rng(1)
    return [draws.permutation(np.arange(2, 50))[:length].astype(np.uint16) for length in LENGTHS]


def test_every_option_is_tried_here() -> None:
    assert set(OPTIONS) == set(OPTION_NAMES)


# --- the promises of any encoder -------------------------------------------------------------------------------------


@each_variant
@torch.no_grad()
def test_a_packed_batch_equals_its_cells_one_by_one(options: dict[str, object], cells: list[np.ndarray]) -> None:
    model = model_of(config_of(**options))
    together = model.encoder(pack(cells)).split(list(LENGTHS))
    for cell, state in zip(cells, together, strict=True):
        torch.testing.assert_close(state, model.encoder(pack([cell])), atol=1e-5, rtol=1e-5)


@each_variant
@torch.no_grad()
def test_a_cell_is_not_changed_by_its_company(options: dict[str, object], cells: list[np.ndarray]) -> None:
    model = model_of(config_of(**options), attention="segments")
    everywhere = torch.arange(sum(LENGTHS))
    for changed in range(len(LENGTHS)):
        others = [cell if number != changed else 51 - cell for number, cell in enumerate(cells)]
        before, after = (model(pack(batch), everywhere).split(list(LENGTHS)) for batch in (cells, others))
        # To the last bit: one addend from another cell, however small, would show.
        same = [torch.equal(here, elsewhere) for here, elsewhere in zip(before, after, strict=True)]
        assert same == [number != changed for number in range(len(LENGTHS))]


@each_variant
def test_no_gradient_reaches_another_cell(options: dict[str, object], cells: list[np.ndarray]) -> None:
    model = model_of(config_of(**options))
    embedded: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, given: object, states: torch.Tensor) -> None:
        states.retain_grad()
        embedded.append(states)

    model.encoder.embeddings.register_forward_hook(keep)
    model.encoder(pack(cells)).split(list(LENGTHS))[2].sin().sum().backward()
    gradient = embedded[0].grad
    assert gradient is not None
    assert [bool(part.any()) for part in gradient.split(list(LENGTHS))] == [False, False, True, False, False]


@each_variant
@pytest.mark.parametrize("backend", ["segments", "eager"])
def test_back_ends_agree_in_values_and_gradients(
    options: dict[str, object], backend: str, cells: list[np.ndarray]
) -> None:
    def logits_and_gradients(name: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model = model_of(config_of(hidden_dropout=0.2, attention_dropout=0.3, **options), attention=name).train()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            logits = model(pack(cells), torch.tensor([1, 20, 30]))
            logits.square().mean().backward()
        return logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    (expected, wanted), (found, gradients) = logits_and_gradients("padded"), logits_and_gradients(backend)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    # Every weight learns.
    assert (
        set(gradients) == set(wanted) == {name for name, _ in MaskedGeneModel(config_of(**options)).named_parameters()}
    )
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], atol=1e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


@each_variant
@torch.no_grad()
def test_stopping_early_gives_the_states_of_a_full_run(options: dict[str, object], cells: list[np.ndarray]) -> None:
    model, batch = model_of(config_of(**options)), pack(cells)
    for layers, state in enumerate(model.encoder.hidden_states(batch)):
        torch.testing.assert_close(model.encoder(batch, layers=layers), state, atol=0, rtol=0)


@each_variant
@torch.no_grad()
def test_attention_weights_are_those_that_mix_the_values(options: dict[str, object], cells: list[np.ndarray]) -> None:
    model, batch = model_of(config_of(**options)), pack(cells)
    given: list[torch.Tensor] = []
    attention = model.encoder.layers[1].attention
    attention.register_forward_hook(lambda module, arguments, result: given.extend([arguments[0], result]))
    model.encoder(batch)
    weights = model.encoder.attention_weights(batch, layer=1)
    value_thk = attention.qkv(given[0]).unflatten(-1, (3, 2, -1))[:, 2]
    mixed = [w @ v.transpose(0, 1) for w, v in zip(weights, value_thk.split(list(LENGTHS)), strict=True)]
    output_td = attention.output(torch.cat([each.transpose(0, 1).flatten(1) for each in mixed]))
    torch.testing.assert_close(output_td, given[1], atol=1e-5, rtol=1e-5)


@each_variant
def test_weights_and_shape_travel_through_a_bundle(
    options: dict[str, object], tmp_path: Path, tiny_vocabulary: Vocabulary
) -> None:
    config = config_of(vocabulary_size=tiny_vocabulary.size, positions=tiny_vocabulary.window, **options)
    model = model_of(config)
    bundle = write_bundle(
        tmp_path / "bundle", kind="masked_gene_model", config=config.to_hf(), weights=to_hf(model),
        vocabulary=tiny_vocabulary, lineage={},
    )  # fmt: skip
    again, encoder = load_model(open_bundle(bundle.folder)), load_encoder(open_bundle(bundle.folder))
    batch = pack([np.arange(4, 40), np.arange(60, 80)])
    with torch.no_grad():
        assert torch.equal(again(batch, torch.arange(56)), model(batch, torch.arange(56)))
        assert torch.equal(encoder(batch), model.encoder(batch))


@each_variant
def test_a_config_with_options_never_says_it_is_a_bert(options: dict[str, object]) -> None:
    config = config_of(**options)
    content = json.loads(json.dumps(config.to_hf()))
    assert EncoderConfig.from_hf(content) == config
    assert content["model_type"] == "genescale_encoder"
    assert content["architectures"] == ["GenescaleMaskedGeneModel"]
    assert (content["num_hidden_layers"], content["hidden_size"]) == (3, 16)
    assert not any(name.startswith(("bert.", "cls.")) for name in to_hf(new_model(config, seed=0)))


def modern_bundle(folder: Path, vocabulary: Vocabulary) -> Bundle:
    config = config_of(vocabulary_size=vocabulary.size, positions=vocabulary.window, **OPTIONS)
    return write_bundle(
        folder, kind="masked_gene_model", config=config.to_hf(), weights=to_hf(model_of(config)),
        vocabulary=vocabulary, lineage={},
    )  # fmt: skip


def test_export_for_transformers_is_refused(tmp_path: Path, tiny_vocabulary: Vocabulary) -> None:
    bundle = modern_bundle(tmp_path / "bundle", tiny_vocabulary)
    with pytest.raises(InputError, match=r"no such encoder.*norm.*seen_genes"):
        export_checkpoint(bundle, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_cells_are_embedded(tmp_path: Path, tiny_vocabulary: Vocabulary) -> None:
    """The seam that embedding, heads, perturbation and serving stand on."""
    embedder = Embedder.load(modern_bundle(tmp_path / "bundle", tiny_vocabulary), device="cpu")
    cells = [np.r_[2, np.arange(10, 10 + length), 3].astype(np.uint16) for length in (5, 30, 5)]
    encoder = load_encoder(open_bundle(tmp_path / "bundle"))
    depths: tuple[tuple[Layer, int], ...] = (("second_to_last", 2), ("last", 3))
    for layer, layers in depths:
        for cell, vector_d in zip(cells, embedder.embed_cells(cells, layer=layer), strict=True):
            with torch.no_grad():
                expected = encoder(pack([cell]), layers=layers)[1:-1].mean(0)
            np.testing.assert_allclose(vector_d, expected.numpy(), atol=1e-4)


def test_an_option_of_a_later_release_is_refused() -> None:
    content = config_of(norm="pre").to_hf()
    content["encoder_options"]["mixture"] = 4
    with pytest.raises(SettingsError, match="mixture"):
        EncoderConfig.from_hf(content)


def test_weights_of_one_architecture_are_no_weights_of_another() -> None:
    published, modern = config_of(), config_of(**OPTIONS)
    with pytest.raises(IntegrityError, match="missing"):
        from_hf(to_hf(new_model(published, seed=0)), modern)
    with pytest.raises(IntegrityError, match="missing"):
        encoder_from_hf(to_hf(new_model(modern, seed=0)), published)


@pytest.mark.parametrize(
    "changes",
    [
        {"norm": "sandwich"}, {"activation": "swish"}, {"rank_knots": 1}, {"rotary_base": 0.5}, {"rank_neighbours": 17},
        {"attention_width": 7}, {"rotary_base": 100.0, "width": 6}, {"rotary_base": 100.0, "attention_width": 6},
    ],
)  # fmt: skip
def test_options_out_of_range_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(SettingsError, match="encoder"):
        config_of(**changes)


# --- what single options mean ----------------------------------------------------------------------------------------


def test_interpolated_ranks_meet_their_knots_and_change_evenly_between_them() -> None:
    ranks = RankKnots(config_of(rank_knots=4, positions=64))
    with torch.no_grad():
        # log(1 + rank) / log(64) x 3: ranks 0, 3, 15 and 63 are the knots.
        torch.testing.assert_close(ranks(torch.tensor([0, 3, 15, 63])), ranks.knots.weight, atol=1e-5, rtol=0)
        middle = ranks(torch.tensor([7]))[0]
    torch.testing.assert_close(middle, (ranks.knots.weight[1] + ranks.knots.weight[2]).detach() / 2, atol=1e-5, rtol=0)


def test_rotary_scores_depend_on_the_distance_of_two_ranks_alone() -> None:
    config = config_of(rotary_base=100.0)
    query, key = torch.randn(2, 1, 2, 8, generator=torch.Generator().manual_seed(0)).expand(2, 12, 2, 8)
    turns = Ranks.of(torch.arange(12), Segments.of((12,)), config).turns
    assert turns is not None
    scores = torch.einsum("ihk,jhk->hij", turned(query, turns), turned(key, turns))
    for distance in (-5, 0, 3):
        along = scores.diagonal(distance, dim1=1, dim2=2)
        torch.testing.assert_close(along, along[:, :1].expand_as(along), atol=1e-4, rtol=0)
    assert float((scores[:, 0, 0] - scores[:, 0, 5]).abs().min()) > 1e-2


def test_neighbours_in_rank_are_added_and_no_others() -> None:
    config = config_of(width=2, heads=1, rank_neighbours=1)
    module = RankNeighbours(config)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[10.0, 1.0], [100.0, 1.0]]))
    batch = pack([np.array([2, 3, 4]), np.array([5])])
    inside = Ranks.of(batch.positions_t, batch.segments, config).inside_to1
    assert inside is not None
    added = module(torch.tensor([[1.0, 1.0], [2.0, 1.0], [3.0, 1.0], [4.0, 1.0]]), inside)
    assert added.tolist() == [[200.0, 1.0], [310.0, 2.0], [20.0, 1.0], [0.0, 0.0]]
    # Where genes were left out, ranks have gaps, and the next gene that is there is the neighbour.
    gaps = pack([np.array([2, 3, 4]), np.array([5])], [np.array([0, 5, 9]), np.array([7])])
    assert gaps.positions_t.tolist() == [0, 5, 9, 7]
    same = Ranks.of(gaps.positions_t, gaps.segments, config).inside_to1
    assert same is not None
    assert torch.equal(same, inside)


def test_untrained_neighbours_change_nothing(cells: list[np.ndarray]) -> None:
    plain = new_model(config_of(norm="pre"), seed=3).eval()
    untrained = new_model(config_of(norm="pre", rank_neighbours=3), seed=3).eval()
    with torch.no_grad():
        assert torch.equal(plain.encoder(pack(cells)), untrained.encoder(pack(cells)))


def test_a_gene_seen_elsewhere_in_the_cell_is_marked() -> None:
    # The second cell holds gene 4 twice: as itself, and where a random gene was put.
    batch = pack([np.array([2, 1, 5]), np.array([4, 1, 4])])
    seen = seen_elsewhere(batch, torch.tensor([0, 1, 3, 4]), 6)
    marked = [set(np.flatnonzero(row).tolist()) for row in seen.numpy()]
    # At its own position a gene may be the answer (10 % are left standing), unless it stands elsewhere as well.
    assert marked == [{1, 5}, {2, 5}, {1, 4}, {4}]


def test_seen_genes_lose_the_learned_amount(cells: list[np.ndarray]) -> None:
    model = new_model(config_of(seen_genes=True), seed=0).eval()
    batch, masked = pack(cells), torch.tensor([0, 12, 40])
    with torch.no_grad():
        hidden_md = model.encoder(batch)[masked]
        raw = model.head(hidden_md, model.encoder.embeddings.tokens.weight)
        expected = raw - SEEN_AMOUNT * seen_elsewhere(batch, masked, 50)
        torch.testing.assert_close(model(batch, masked), expected)


def test_what_writes_to_a_sum_that_nothing_normalises_begins_smaller() -> None:
    post, pre = (new_model(config_of(norm=norm, width=128, initializer_range=0.02), seed=0) for norm in ("post", "pre"))
    for name, ratio in (("attention.output", 6**-0.5), ("narrow", 6**-0.5), ("widen", 1.0)):
        before, after = (model.encoder.layers[0].get_submodule(name).weight.std() for model in (post, pre))
        torch.testing.assert_close(after / before, torch.tensor(ratio), atol=0.02, rtol=0)


# --- what it costs ---------------------------------------------------------------------------------------------------


def counted_flops(config: EncoderConfig, cells: list[np.ndarray], masked: torch.Tensor) -> float:
    """FLOPs of the matrix products of a forward pass, as torch counts them."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        new_model(config, seed=0, attention="eager").eval()(pack(cells), masked)
    return float(counter.get_total_flops())


@each_variant
def test_the_formula_counts_the_matrix_products_that_are_computed(
    options: dict[str, object], cells: list[np.ndarray]
) -> None:
    config, masked = config_of(**options), torch.tensor([0, 12, 40, 41])
    work = Work(tokens=sum(LENGTHS), squares=sum(length**2 for length in LENGTHS), masked=4)
    single = {"rank_neighbours": 0, "rotary_base": 0.0, "rank_knots": 0, "seen_genes": False}
    matrices = config_of(**{**options, **single})
    assert training_flops(matrices, work) / 3 == counted_flops(config, cells, masked)


def test_what_works_on_single_numbers_is_counted_where_an_option_adds_it() -> None:
    work, plain = (
        Work(tokens=10, squares=60, masked=2),
        training_flops(config_of(), Work(tokens=10, squares=60, masked=2)),
    )

    def added(**options: object) -> float:
        return (training_flops(config_of(**options), work) - plain) / 3

    assert added(rank_neighbours=2) == 3 * 10 * 4 * 2 * 16
    assert added(rotary_base=100.0) == 3 * 10 * 2 * 3 * 16
    assert added(rank_knots=5) == 10 * 3 * 16
    assert added(seen_genes=True) == 2 * 2 * 50


# --- recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("modern", "published"), [("modern", "geneformer-v1-10m"), ("modern-tiny", "tiny")])
def test_a_modern_recipe_is_no_larger_than_what_it_replaces(modern: str, published: str) -> None:
    genes = [f"ENSG{number:011d}" for number in range(2_000)]
    vocabulary = Vocabulary.build(genes, np.ones(2_000), window=512, name="any")
    one, other = (read_recipe(name).encoder.for_vocabulary(vocabulary) for name in (modern, published))
    assert (one.is_published, other.is_published) == (False, True)
    assert (one.layers, one.width) == (other.layers, other.width)
    work = Work(tokens=512, squares=512**2, masked=77)
    assert training_flops(one, work) <= 1.02 * training_flops(other, work)
