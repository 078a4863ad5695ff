import pytest
import torch
from hidden_states import views_of
from hypothesis import given
from hypothesis import strategies as st

from steer_optim import measure
from steer_optim.vlm import token_losses
from steer_optim.vlm.analysis import angles_by_decile


def batch(B=3, T=9, V=7, d=4, seed=0):
    """A student with shared weights for both views, its token losses, and a mask that keeps 20 of 27 tokens."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    hidden, hidden_text, teacher, teacher_text = draw(B, T, d), draw(B, T, d), draw(B, T, V), draw(B, T, V)
    parameters = [draw(d, V).requires_grad_(), draw(V).requires_grad_()]
    weight, bias = parameters
    views = views_of([hidden @ weight + bias, hidden_text @ weight + bias, teacher, teacher_text])
    losses = token_losses(views)
    mask_BT = torch.arange(T) < torch.tensor([9, 7, 4])[:, None]
    components = {name: losses[name] for name in ("std", "vis", "lang")}
    return components, losses["vds"], mask_BT, parameters


def test_each_bin_is_the_geometry_of_its_tokens():
    components, vds_BT, mask_BT, parameters = batch()
    geometry = angles_by_decile(components, vds_BT, mask_BT, parameters)
    assert geometry.names == ("std", "vis", "lang")
    assert geometry.angle("std", "vis").shape == (10,)
    assert len(geometry.G) == 10
    threshold = vds_BT[mask_BT].sort().values[::2]  # 20 tokens: two to a decile
    for i in range(10):
        chosen = mask_BT & (vds_BT >= threshold[i])
        if i < 9:
            chosen &= vds_BT < threshold[i + 1]
        assert int(chosen.sum()) == 2
        means = {name: (loss * chosen).sum() / 2 for name, loss in components.items()}
        # Two orders of summation in float64.
        torch.testing.assert_close(geometry.G[i], measure(means, parameters).G, rtol=1e-12, atol=1e-14)


def test_one_bin_is_the_whole_batch():
    components, vds_BT, mask_BT, parameters = batch()
    geometry = angles_by_decile(components, vds_BT, mask_BT, parameters, bins=1)
    whole = measure({name: loss[mask_BT].mean() for name, loss in components.items()}, parameters)
    torch.testing.assert_close(geometry.G[0], whole.G, rtol=1e-12, atol=1e-14)


@given(st.lists(st.integers(0, 3), min_size=4, max_size=12), st.integers(1, 4))
def test_bins_are_ranks_with_ties_by_index(scores, bins):
    # Each token's loss is a coordinate of its own, so that the gradient says which tokens are in a bin.
    x = torch.ones(len(scores), dtype=torch.float64, requires_grad=True)
    mask = torch.ones(1, len(scores), dtype=torch.bool)
    tokens = [
        angles_by_decile(
            {"all": x[None], "one": x[None] * torch.eye(len(scores))[token]},
            torch.tensor([scores], dtype=torch.float32),
            mask,
            [x],
            bins=bins,
        ).norm("one")
        for token in range(len(scores))
    ]
    found = torch.stack(tokens).argmax(1).tolist()
    order = sorted(range(len(scores)), key=lambda token: (scores[token], token))
    size, rest = divmod(len(scores), bins)
    sizes = [size + (i < rest) for i in range(bins)]
    expected = [i for i, n in enumerate(sizes) for _ in range(n)]
    assert [found[token] for token in order] == expected


def test_leaves_gradients_and_graph_alone():
    components, vds_BT, mask_BT, parameters = batch()
    angles_by_decile(components, vds_BT, mask_BT, (p for p in parameters))
    assert all(p.grad is None for p in parameters)
    components["std"].sum().backward()  # raises if the graph were freed


def test_masked_tokens_are_not_read():
    components, vds_BT, mask_BT, parameters = batch()
    expected = angles_by_decile(components, vds_BT, mask_BT, parameters)
    poisoned = vds_BT.masked_fill(~mask_BT, torch.nan)
    losses = {name: loss.masked_fill(~mask_BT, torch.nan) for name, loss in components.items()}
    found = angles_by_decile(losses, poisoned, mask_BT, parameters)
    assert torch.equal(found.G, expected.G)


def test_the_dependency_beside_token_losses_is_no_component():
    components, vds_BT, mask_BT, parameters = batch()
    found = angles_by_decile({**components, "vds": vds_BT}, vds_BT, mask_BT, parameters)
    assert found.names == tuple(components)


def test_refusals():
    components, vds_BT, mask_BT, parameters = batch()

    def call(**changes):
        options = {"vds_BT": vds_BT, "mask_BT": mask_BT, "parameters": parameters, **changes}
        return angles_by_decile(options.pop("token_losses", components), **options)

    with pytest.raises(ValueError, match=r"21 bins need .* keeps 20"):
        call(bins=21)
    with pytest.raises(ValueError, match="0 bins"):
        call(bins=0)
    with pytest.raises(ValueError, match=r"10 bins need .* keeps 0"):
        call(mask_BT=torch.zeros_like(mask_BT))
    with pytest.raises(TypeError, match=r"mask_BT must be bool.*torch\.float32"):
        call(mask_BT=mask_BT.float())
    with pytest.raises(ValueError, match=r"'vis' must have the shape of mask_BT, \(3, 9\); got \(3, 8\)"):
        call(token_losses={**components, "vis": components["vis"][:, 1:]})
    with pytest.raises(ValueError, match=r"'vds_BT' must have the shape"):
        call(vds_BT=vds_BT[0])
    with pytest.raises(ValueError, match="finite"):
        call(vds_BT=torch.full_like(vds_BT, torch.inf))
    with pytest.raises(ValueError, match="'lang'"):
        call(token_losses={**components, "lang": components["lang"].detach()})
