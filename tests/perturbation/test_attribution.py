"""What a deletion changes, computed at once for all deletions, against deleting."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from genescale.perturbation.answers import Readouts
from genescale.perturbation.perturb import EditRequest, perturb_cell
from genescale.perturbation.readouts.states import States
from genescale.perturbation.screening.attribution import Attribution
from genescale.perturbation.screening.first_pass import FirstPass, combined, first_pass_scores
from genescale.perturbation.screening.removal import HeadScores, changed_neighbours, neighbours_without
from genescale.perturbation.screening.two_pass import TwoPassConfig
from genescale.platform.bundle import write_bundle
from genescale.platform.errors import SettingsError
from genescale.training.attention import Segments
from genescale.training.embedder import Embedder
from genescale.training.heads.head import new_head
from genescale.training.heads.predict import HeadModel
from genescale.training.heads.spec import HeadSpec
from genescale.training.model import Encoder, EncoderConfig, new_model, pack
from genescale.training.ranks import RankNeighbours, Ranks, turned
from genescale.training.weights import to_hf
from tests.perturbation.conftest import tiny_vocabulary

MODERN = {"rank_knots": 8, "rotary_base": 10_000.0, "rank_neighbours": 2, "seen_genes": True}
ENCODERS = {
    "published": {},
    "modern": MODERN,
    "other options": {"norm": "pre", "activation": "geglu", "biases": False, "query_key_norm": True, "rank_knots": 8},
}
TOKENS = 12


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def config(layers: int = 2, scale: float = 0.15, **options: object) -> EncoderConfig:
    sizes = {"vocabulary_size": 64, "width": 32, "heads": 2, "feed_forward": 64, "positions": 48}
    return EncoderConfig(**sizes, layers=layers, initializer_range=scale, **options)  # type: ignore[arg-type]


def encoder(**options: object) -> Encoder:
    """Random weights; those of neighbours, which begin at zero, are set, and one rank is much like the next."""
    made = new_model(config(**options), seed=0).encoder.requires_grad_(False).eval()  # type: ignore[arg-type]
    for tensor in made.embeddings.positions.parameters():
        tensor.mul_(0.3)
    for number, layer in enumerate(made.layers):
        if layer.neighbours is not None:
            layer.neighbours.weight.copy_(normal(*layer.neighbours.weight.shape, seed=number) * 0.3)
    return made


@pytest.fixture(scope="module", params=list(ENCODERS))
def embedder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Embedder:
    """A random model of two layers; the first pass knows it by its bundle alone."""
    vocabulary = tiny_vocabulary(framed=True)
    shape = config(**ENCODERS[request.param])
    model = new_model(shape, seed=0)
    model.encoder.load_state_dict(encoder(**ENCODERS[request.param]).state_dict())
    folder = tmp_path_factory.mktemp("model") / "bundle"
    kind = "masked_gene_model"
    bundle = write_bundle(
        folder, kind=kind, config=shape.to_hf(), weights=to_hf(model), vocabulary=vocabulary, lineage={}
    )
    return Embedder.load(bundle, device="cpu")


@pytest.fixture
def cell(embedder: Embedder, make_cell: Callable[..., np.ndarray]) -> np.ndarray:
    """A cell of 40 genes."""
    return make_cell(embedder.vocabulary, np.random.default_rng(1).permutation(60)[:40].tolist())


def exact(embedder: Embedder, tokens_t: np.ndarray, readouts: Readouts) -> list:
    genes = [int(token) for token in tokens_t[1:-1]]
    requests = [EditRequest(kind="delete", genes=(gene,)) for gene in genes]
    return perturb_cell(embedder, tokens_t, requests, readouts=readouts)


@pytest.mark.parametrize("rotary", [False, True])
def test_attention_without_each_token_is_that_of_the_cell_without_it(rotary: bool) -> None:
    query_tw, key_tw, content_tt = normal(TOKENS, 8), normal(TOKENS, 8, seed=1), normal(TOKENS, TOKENS, seed=2)
    shape = config(rotary_base=10_000.0 if rotary else 0.0, attention_width=16)

    def ranked(vectors_tw: torch.Tensor, place_t: torch.Tensor) -> torch.Tensor:
        turns = Ranks.of(place_t, Segments.of((len(place_t),)), shape).turns
        return vectors_tw if turns is None else turned(vectors_tw[:, None], turns)[:, 0]

    place_t = torch.arange(TOKENS)
    turns = Ranks.of(torch.ones(1, dtype=torch.int64), Segments.of((1,)), shape).turns
    found_tt = HeadScores(ranked(query_tw, place_t), ranked(key_tw, place_t), turns).changed_means(content_tt)

    def means(kept_t: torch.Tensor) -> torch.Tensor:
        now_t = torch.arange(len(kept_t))
        scores = ranked(query_tw[kept_t], now_t) @ ranked(key_tw[kept_t], now_t).T / 8**0.5
        return (torch.softmax(scores, dim=1) * content_tt[kept_t][:, kept_t]).sum(1)

    whole_t = means(place_t)
    for gone in range(TOKENS):
        kept_t = place_t[place_t != gone]
        torch.testing.assert_close(found_tt[kept_t, gone], means(kept_t) - whole_t[kept_t], atol=2e-6, rtol=1e-4)


def test_neighbours_of_a_gap_are_those_of_the_cell_without_the_gene() -> None:
    shape = config(rank_neighbours=2)
    module = RankNeighbours(shape).requires_grad_(False)
    module.weight.copy_(normal(4, 32))
    hidden_td, above_td = normal(TOKENS, 32, seed=1), normal(TOKENS, 32, seed=2)

    def added(kept_t: torch.Tensor) -> torch.Tensor:
        segments = Segments.of((len(kept_t),))
        inside_to1 = Ranks.of(torch.arange(len(kept_t)), segments, shape).inside_to1
        assert inside_to1 is not None
        return module(hidden_td[kept_t], inside_to1)

    place_t = torch.arange(TOKENS)
    whole_td, moves_tt = added(place_t), changed_neighbours(module, hidden_td, above_td)
    streams_ctd = neighbours_without(module, hidden_td.expand(5, -1, -1), (-2, -1, 1, 2))
    torch.testing.assert_close(streams_ctd[-1], whole_td)
    for gone in range(TOKENS):
        kept_t = place_t[place_t != gone]
        after_td = added(kept_t)
        change_t = (above_td[kept_t] * (after_td - whole_td[kept_t])).sum(1)
        torch.testing.assert_close(moves_tt[kept_t, gone], change_t, atol=1e-5, rtol=1e-4)
        for number, delta in enumerate((-2, -1, 1, 2)):
            if 0 <= (k := gone - delta) < TOKENS:
                torch.testing.assert_close(streams_ctd[number, k], after_td[int((kept_t == k).nonzero())])


@pytest.mark.parametrize("options", ENCODERS.values(), ids=list(ENCODERS))
def test_the_watched_encoder_computes_what_the_encoder_does(options: dict[str, object]) -> None:
    watched_of = encoder(**options)
    tokens_t = torch.arange(5, 5 + TOKENS)
    batch = pack([tokens_t.numpy()])
    attribution = Attribution(watched_of)
    for layers in (0, 1, 2):
        states_td = attribution.states(tokens_t, layers=layers)
        torch.testing.assert_close(states_td.detach(), watched_of(batch, layers=layers))
        near_ctd = attribution.near(tokens_t, (-1, 1), layers=layers)
        torch.testing.assert_close(near_ctd[-1], watched_of(batch, layers=layers))
    # The encoder itself is as it was: another pass through it knows nothing of the watching.
    assert "attend" not in vars(watched_of.layers[0].attention)
    assert not watched_of(batch).requires_grad
    shared = zip(watched_of.parameters(), attribution._encoder.parameters(), strict=True)
    assert all(ours is theirs for ours, theirs in shared)


@pytest.mark.parametrize("options", ENCODERS.values(), ids=list(ENCODERS))
def test_moves_go_back_through_all_layers(options: dict[str, object]) -> None:
    """Small enough a movement is first order: the sum over tokens is then the change of the scalar itself."""
    made = encoder(**options)
    for tensor in (*made.embeddings.positions.parameters(), *(p for n, p in made.named_parameters() if "neigh" in n)):
        tensor.mul_(0.02)
    tokens_t = torch.arange(5, 45)
    attribution = Attribution(made)
    direction_d = normal(32)
    # Of the last token, which nothing but attention and its rank connects to most deletions.
    found_t = attribution.moves(attribution.states(tokens_t, layers=2)[-1] @ direction_d).sum(0)
    whole = made(pack([tokens_t.numpy()]), layers=2)[-1] @ direction_d
    changes = [made(pack([np.delete(tokens_t.numpy(), i)]), layers=2)[-1] @ direction_d - whole for i in range(35)]
    true_t = torch.stack(changes)
    assert float(np.corrcoef(found_t[:35], true_t)[0, 1]) > 0.98
    assert 0.9 < float((found_t[:35] @ true_t) / (true_t @ true_t)) < 1.1


@pytest.mark.parametrize("layer", ["second_to_last", pytest.param("last", marks=pytest.mark.slow)])
def test_estimates_order_deletions_as_deleting_does(embedder: Embedder, cell: np.ndarray, layer: str) -> None:
    readouts = Readouts(layer=layer)  # type: ignore[arg-type]
    true_g = np.array([answer.shift for answer in exact(embedder, cell, readouts)])
    found_g = FirstPass(embedder, readouts, TwoPassConfig(probes=16)).estimates(cell)["shift"]
    assert spearmanr(true_g, found_g)[0] > 0.85
    assert 0.7 < np.median(found_g / true_g) < 1.4


@pytest.mark.parametrize("measure", [pytest.param("cls", marks=pytest.mark.slow), "mean_pooled"])
def test_estimates_of_one_vector_and_toward_states(embedder: Embedder, cell: np.ndarray, measure: str) -> None:
    pooling = "cls" if measure == "cls" else "mean_genes"
    states = States(names=("a", "b"), vectors_sd=normal(2, embedder.width).numpy(), layer="last", pooling=pooling)
    readouts = Readouts(layer="last", measure=measure, states=states)  # type: ignore[arg-type]
    answers = exact(embedder, cell, readouts)
    found = FirstPass(embedder, readouts, TwoPassConfig(probes=8)).estimates(cell)
    assert list(found) == ["shift", "toward:a", "toward:b"]
    assert spearmanr([answer.shift for answer in answers], found["shift"])[0] > 0.7
    for at, name in enumerate(states.names):
        assert np.corrcoef([answer.state_shifts[at] for answer in answers], found[f"toward:{name}"])[0, 1] > 0.8


def head(embedder: Embedder, **options: object) -> HeadModel:
    wanted = {"layer": "last", "pooling": "mean_genes", "classes": ("ill", "well"), "dropout": 0.0, **options}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        made = new_head(HeadSpec(label="disease", width=embedder.width, **wanted))  # type: ignore[arg-type]
    return HeadModel(embedder=embedder, heads=(made,))


def test_estimates_of_class_changes(embedder: Embedder, cell: np.ndarray) -> None:
    readouts = Readouts(head=head(embedder))
    changes = np.array([answer.class_changes for answer in exact(embedder, cell, readouts)])
    found = FirstPass(embedder, readouts, TwoPassConfig(rank_by="classes")).estimates(cell)
    assert list(found) == ["class:ill", "class:well"]
    assert np.corrcoef(changes[:, 0], found["class:ill"])[0, 1] > 0.8
    np.testing.assert_allclose(found["class:ill"], -found["class:well"], atol=1e-6)
    votes = Readouts(head=head(embedder, type="nearest"))
    with pytest.raises(SettingsError, match="nearest examples"):
        FirstPass(embedder, votes, TwoPassConfig())


def test_scores_are_the_same_every_time_and_follow_the_highest_readout(embedder: Embedder, cell: np.ndarray) -> None:
    config_ = TwoPassConfig(probes=2, seed=3)
    first = FirstPass(embedder, Readouts(), config_)
    np.testing.assert_array_equal(first.scores(cell), first.scores(cell))
    np.testing.assert_array_equal(first.scores(cell), first_pass_scores(embedder, cell, Readouts(), config_))
    scores_g = combined({"shift": np.array([0.1, 0.2, 0.3, 0.0]), "toward:a": np.array([-9.0, 0.5, 0.1, 0.0])})
    np.testing.assert_allclose(scores_g, [1.0, 0.75, 1.0, 0.25])


def test_a_cell_of_one_gene_scores_nothing(embedder: Embedder, make_cell: Callable[..., np.ndarray]) -> None:
    alone = make_cell(embedder.vocabulary, [5])
    np.testing.assert_array_equal(first_pass_scores(embedder, alone, Readouts(), TwoPassConfig()), [0.0])


def test_ranks_alone_need_no_model(embedder: Embedder, cell: np.ndarray) -> None:
    scores_g = first_pass_scores(embedder, cell, Readouts(), TwoPassConfig(first_pass="rank"))
    np.testing.assert_array_equal(np.argsort(-scores_g), np.arange(40))


def test_a_readout_that_is_not_there_cannot_rank(embedder: Embedder) -> None:
    with pytest.raises(SettingsError, match="ranked by states"):
        FirstPass(embedder, Readouts(), TwoPassConfig(rank_by="states"))
