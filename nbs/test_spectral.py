"What only a maintainer of the trade-off needs: wrong calls are named, batches do not matter, nothing is left behind."
import math

import numpy as np
import pytest
import torch
from torch import nn

from xai_nb import spectral
from xai_nb.decision import decision_page, default_families
from xai_nb.spectral import (
    cam_family,
    choose,
    ef_penalty,
    gap_exponent,
    gains,
    lowpass_family,
    pareto_front,
    plane,
    predict_gap,
    sensitivity,
    shown_gaps,
    smoothgrad_family,
    softplus_family,
    trade_off,
    walk,
)


@pytest.fixture(autouse=True)
def one_thread():
    "As on the pages."
    torch.set_num_threads(1)


def toy():
    "Two convolutions with ReLU, double precision, the same weights each time."
    with torch.random.fork_rng():
        torch.manual_seed(0)
        convs = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()]
        return nn.Sequential(*convs, nn.Flatten(), nn.Linear(2048, 3)).double()


@pytest.fixture
def x():
    "Pictures of noise."
    return torch.randn(12, 1, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def refused(words, call, kind=ValueError):
    "The call fails with this kind of error, and its message says these words."
    with pytest.raises(kind) as said:
        call()
    assert words in str(said.value), str(said.value)


def test_wrong_calls_are_named(x):
    "Grids, rules, knobs and pictures that mean nothing."
    plain = nn.Sequential(nn.Flatten(), nn.Linear(256, 3)).double()
    by_noise = trade_off(toy(), x, smoothgrad_family(2), [0.1, 0.2, 0.4])
    by_cutoff = trade_off(plain, x, lowpass_family(), [0.2])
    cams = trade_off(toy(), x, cam_family(), ["1", "3"])
    refused("sigma is -0.1", lambda: trade_off(plain, x, smoothgrad_family(4), [-0.1]))
    refused("grid is empty", lambda: trade_off(plain, x, smoothgrad_family(4), []))
    refused("one rule", lambda: choose(by_noise))
    refused("positive number", lambda: choose(by_noise, max_gap=0.0))
    refused("expected a share", lambda: choose(by_noise, max_gap=0.1, images=1.5))
    refused("no power law", lambda: predict_gap(by_cutoff))
    refused("the grid has 3", lambda: predict_gap(by_noise, at=9))
    refused("is no number", lambda: sensitivity(cams))
    refused("two values", lambda: gap_exponent(by_cutoff))
    refused("no family", lambda: plane([]))
    refused("image is 99", lambda: walk(by_noise, 99))
    refused("a callable as target", lambda: trade_off(nn.Conv2d(1, 3, 3).double(), x, lowpass_family(), [0.2]))
    assert cams.points[0].relative_gap is None and choose(cams, max_complexity=0.5).value in ("1", "3")
    assert not choose(by_noise, max_gap=1e-6).met


def test_numbers_of_other_libraries_are_numbers(x):
    "NumPy arrays and tensors are grids."
    for grid in (np.array([1, 5]), np.float32([1, 5]), torch.tensor([1.0, 5.0])):
        assert trade_off(toy(), x[:4], softplus_family(), grid).values == (1.0, 5.0)


def test_wrong_pages_are_refused(x):
    "Before anything is measured."
    net = toy()
    refused("no interval", lambda: decision_page(net, x[:1]))
    refused("floating-point", lambda: decision_page(net, x.byte()), TypeError)
    refused("non-finite", lambda: decision_page(net, x / 0))
    refused("constant", lambda: decision_page(net, torch.ones(4, 1, 16, 16, dtype=torch.float64)))
    refused("above 0 and at most 1", lambda: decision_page(net, x, uses={"audit": 2.0}))
    refused("end in .md or .html", lambda: decision_page(net, x, "guide.pdf"))
    refused("does not exist", lambda: decision_page(net, x, "no/such/folder/guide.md"))
    assert len(default_families(x)) == 3


@pytest.mark.parametrize("family, value", [(smoothgrad_family(2), 0.3), (softplus_family(), 2.0), (lowpass_family(), 0.3)])
def test_batches_do_not_matter(x, family, value):
    "The same numbers whatever goes through the model at once."
    whole, parts = (trade_off(toy(), x, family, [value], batch_size=n) for n in (None, 5))
    assert math.isclose(shown_gaps(whole)[0], shown_gaps(parts)[0], rel_tol=1e-9)
    torch.testing.assert_close(whole.maps[0], parts.maps[0], rtol=1e-9, atol=1e-12)


def test_nothing_is_left_behind(x):
    "Flags, gradients, hooks and random state."
    net = toy().train()
    state = torch.get_rng_state()
    trade = trade_off(net, x, smoothgrad_family(2), [0.1, 0.2])
    choose(trade, max_gap=0.2)
    ef_penalty(net, x[:2], torch.tensor([0, 1]))
    assert torch.equal(state, torch.get_rng_state()) and all(m.training for m in net.modules())
    assert all(p.grad is None for p in net.parameters()) and not any(m._forward_hooks for m in net.modules())


def test_useless_settings_are_off_the_front(x):
    "What is no calmer than the gradient, or no closer than a blank map, is not recommended."
    blank = spectral.Surrogate("blank", "knob", lambda g, v: g * 1e-6 + 3 * v * g.flip(2), 1, filters=True)
    trade = trade_off(toy(), x, blank, [1.0])
    assert shown_gaps(trade)[0] > 1 and pareto_front(trade) == [False] and not gains(trade.points[0])


def test_series_and_volumes():
    "A trade-off of a series and of a volume."
    g = torch.Generator().manual_seed(0)
    line = nn.Sequential(nn.Conv1d(2, 4, 5), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 28, 3)).double()
    solid = nn.Sequential(nn.Conv3d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 6**3, 3)).double()
    for net, shape in ((line, (6, 2, 32)), (solid, (4, 1, 8, 8, 8))):
        x = torch.randn(shape, dtype=torch.float64, generator=g)
        trade = trade_off(net, x, lowpass_family(), [0.2, 0.35])
        assert shown_gaps(trade)[0] > shown_gaps(trade)[1] > 0
        assert 0 < trade_off(net, x, smoothgrad_family(2), [0.2]).points[0].shown_gap.value


def test_a_family_that_a_model_does_not_allow_is_left_out(x):
    "A linear model has nothing to smooth: the page says so and goes on."
    plain = nn.Sequential(nn.Flatten(), nn.Linear(256, 3)).double()
    page = decision_page(plain, x, families=[(softplus_family("backward"), [2.0]), (lowpass_family(), [0.3, 0.5])])
    assert "Left out: smooth activation" in page.text and "in Sequential" in page.text
    refused("no family could be measured", lambda: decision_page(plain, x, families=[(softplus_family("backward"), [2.0])]))


def test_outputs_in_a_dict(x):
    "The cure is named, and works."

    class Dict(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = toy()

        def forward(self, x):
            return {"logits": self.net(x)}

    refused("of='output'", lambda: trade_off(Dict(), x, lowpass_family(), [0.3]), TypeError)
    by_hand = trade_off(Dict(), x, lowpass_family(), [0.3], lambda out: out["logits"][:, 1], of="output")
    assert shown_gaps(by_hand) == shown_gaps(trade_off(toy(), x, lowpass_family(), [0.3], 1, of="output"))


def test_several_labels_and_softmax(x):
    "`log_sigmoid` couples no labels; a model that ends in softmax is told so."
    net = toy()
    g = spectral.ask(net, x, 1, of="log_sigmoid").gradient
    leaf = x.clone().requires_grad_()
    by_hand = torch.autograd.grad(nn.functional.logsigmoid(net(leaf)[:, 1]).sum(), leaf)[0]
    torch.testing.assert_close(g, by_hand, rtol=1e-10, atol=1e-14)
    ends = nn.Sequential(*net, nn.Softmax(1))
    refused("probabilities already", lambda: spectral.ask(ends, x))
    refused("probabilities already", lambda: spectral.ask(ends, x, lambda out: out[:, 0]))
    refused("ends in a sigmoid", lambda: spectral.ask(nn.Sequential(*net, nn.Sigmoid()), x.repeat(8, 1, 1, 1), 1, of="log_sigmoid"))
    assert spectral.ask(ends, x, of="output").gradient.any()
    assert shown_gaps(trade_off(net, x, softplus_family("backward"), [4.0], of="log_sigmoid"))[0] > 0


@pytest.mark.parametrize("family, grid", [(smoothgrad_family(2), [0.1, 0.4]), (softplus_family("backward"), [1.0, 10.0]), (lowpass_family(), [0.1, 0.4])])
def test_the_slider_redraws(x, family, grid, capsys):
    "Noise, sharpness, cut-off: a move of the knob draws another figure, and moving back draws the first one again."
    slider = walk(trade_off(toy(), x[:4], family, grid, 0), image=1, live=True)
    knob = slider.children[0]
    assert knob.description == family.knob and list(knob.options) == grid
    drawn = []
    for value in (grid[1], grid[0], grid[1]):
        knob.value = value
        drawn.append(slider.result.rgb())
    slider.close()
    assert (drawn[0] != drawn[1]).any() and (drawn[0] == drawn[2]).all()
