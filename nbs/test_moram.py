"What only a maintainer of `regression_cam` needs: it leaves nothing behind, a map does not depend on its batch, wrong calls are named."
import copy
import gc
import tempfile
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from xai_nb.localisation import localisation_scores
from xai_nb.models import load_weights, small_mixer, small_vgg, torchvision_model
from xai_nb.moram import find_gap_head, moram, regression_cam, token_grid


@pytest.fixture(autouse=True)
def one_thread():
    "As on the pages."
    torch.set_num_threads(1)


@pytest.fixture
def images():
    "Three small pictures."
    return torch.rand(3, 1, 12, 12, generator=torch.Generator().manual_seed(1))


def gap_net(n_outputs=1):
    "Convolution, in-place ReLU, pool, average, linear head; the same weights each time."
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tail = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, n_outputs)]
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2), *tail)


class SharedReLU(nn.Module):
    "One ReLU module that runs twice."

    def __init__(self):
        super().__init__()
        self.a, self.b, self.relu = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.ReLU(inplace=True)
        self.head = nn.Linear(4, 1)

    def forward(self, x):
        return self.head(self.relu(self.b(self.relu(self.a(x)))).mean((2, 3)))


def state(net):
    "All that a call could leave behind."
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in net.modules())
    grads = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
    return hooks, [m.training for m in net.modules()], str(grads), str(torch.get_rng_state()), torch.is_grad_enabled()


@pytest.fixture
def vgg():
    "A net with BatchNorm, partly in train mode, with a gradient that must survive."
    net = small_vgg(width=4, norm=True).train()
    net.features[3].eval()
    net.head.weight.grad = torch.full_like(net.head.weight, 2.0)
    return net


def test_nothing_is_left_behind(vgg):
    "Gradients, flags, hooks, random state and gradient modes are as before, also after an exception."
    x = torch.rand(3, 1, 32, 32)
    before, first = state(vgg), regression_cam(vgg, x)
    assert state(vgg) == before and not first.moram.requires_grad
    with torch.no_grad():
        assert torch.equal(regression_cam(vgg, x).moram, first.moram)
    with torch.inference_mode():
        assert torch.equal(regression_cam(vgg, x.clone()).moram, first.moram)
    with pytest.raises(ValueError):
        regression_cam(vgg, x, "features.0", target=lambda y: y.sum())
    assert state(vgg) == before


def test_frozen_and_in_place(vgg):
    "Frozen parameters and in-place ReLUs give the same maps bit for bit."
    x = torch.rand(3, 1, 32, 32)
    first, inplace = regression_cam(vgg, x), copy.deepcopy(vgg).requires_grad_(False)
    for m in inplace.modules():
        if isinstance(m, nn.ReLU):
            m.inplace = True
    assert torch.equal(regression_cam(inplace, x).moram, first.moram)


def test_no_tensor_stays_alive(images):
    "200 calls leave no tensor alive."
    alive = lambda: sum(issubclass(type(o), Tensor) for o in gc.get_objects())
    net = gap_net()
    regression_cam(net, images)
    gc.collect()
    n = alive()
    for _ in range(200):
        regression_cam(net, images)
    gc.collect()
    assert alive() == n


def test_a_map_in_a_batch_is_the_map_alone(images):
    "Outputs (B,), (B 1) and (B K) work; one target serves all examples, a list serves each; chunks change nothing."
    many, x = gap_net(3).double(), images.double()
    whole = regression_cam(many, x, target=[2, 0, 1])
    for i, t in enumerate([2, 0, 1]):
        assert_close(regression_cam(many, x[i : i + 1], target=t).moram[0], whole.moram[i], rtol=0, atol=1e-12)
    assert_close(regression_cam(many, x, target=[2, 0, 1], batch_size=2).moram, whole.moram, rtol=0, atol=1e-12)
    by_function = regression_cam(many, x, target=lambda y: y[:, 1])
    assert_close(by_function.moram, regression_cam(many, x, target=1).moram)
    deep = gap_net()
    flat = nn.Sequential(*deep, nn.Flatten(0))
    assert flat(images).shape == (3,) and torch.equal(regression_cam(flat, images, "2").moram, regression_cam(deep, images).moram)
    assert torch.equal(regression_cam(deep, images, progress=True).moram, regression_cam(deep, images).moram)


def test_a_dead_network_is_flagged():
    "An all-zero map is flagged, its scores are NaN, and it is counted; it never passes for a result."
    dead = small_vgg(width=4)
    dead.head.weight.data.zero_()
    r = regression_cam(dead, torch.rand(2, 1, 32, 32))
    scores = localisation_scores(r.upsample(), torch.eye(32).bool().expand(2, -1, -1))
    assert r.empty.all() and r.cancellation.tolist() == [0, 0]
    assert scores["auc_minmax"].isnan().all() and scores["roc"].isnan().all() and scores["empty"].all()


def refused(words, call, kind=ValueError):
    "The call fails with this kind of error, and its message says these words."
    with pytest.raises(kind) as said:
        call()
    assert words in str(said.value), str(said.value)


def test_wrong_calls_are_named(images):
    "Layers, targets, shapes and numbers that cannot be explained."
    deep, many = gap_net(), gap_net(3)
    nan = images.clone()
    nan[1, 0, 3, 3] = torch.nan
    unused = copy.deepcopy(deep)
    unused.spare = nn.ReLU()
    unused.forward = lambda x: deep(x)
    mixer = small_mixer(in_channels=1, n_classes=3, image_size=16, patch=4)
    last_block = [name for name, m in mixer.named_modules() if isinstance(m, nn.LayerNorm)][-1]
    swapped = nn.Sequential(*deep, nn.Flatten(0), nn.Unflatten(0, (1, 3)))
    refused("that is used", lambda: regression_cam(unused, images, "spare"))
    refused("target", lambda: regression_cam(many, images))
    refused("outside 0 ... 2", lambda: regression_cam(many, images, target=3))
    refused("for 3 examples", lambda: regression_cam(many, images, target=[0, 1], batch_size=2))
    refused("no positions left", lambda: regression_cam(deep, images, "4"))
    refused("conv9", lambda: regression_cam(deep, images, "conv9"))
    refused("non-finite", lambda: regression_cam(deep, nan))
    refused("first axis must be the batch", lambda: regression_cam(swapped, images, "2", 0))
    refused("token_grid", lambda: regression_cam(mixer, torch.rand(2, 1, 16, 16), last_block, 0))
    refused("do not fill a grid", lambda: token_grid()(torch.rand(1, 7, 2)))
    refused("expected (B K *S)", lambda: moram(torch.rand(2, 3, 4, 4), torch.rand(4)))
    refused("no map named 'ram'", lambda: regression_cam(deep, images).upsample("ram"))
    refused("empty list", lambda: regression_cam(deep, images, []))
    refused("x.float() / 255", lambda: regression_cam(deep, images.byte()), TypeError)
    refused("torch.as_tensor", lambda: regression_cam(deep, images.numpy()), TypeError)
    refused("torch.nn.Module", lambda: regression_cam(deep.forward, images), TypeError)
    broken = copy.deepcopy(deep)
    broken[-1].weight.data[0, 0] = torch.nan
    refused("non-finite", lambda: find_gap_head(deep, nan))
    refused("non-finite", lambda: find_gap_head(broken, images))


def test_foreign_weights_are_named():
    "A weights file of another architecture says what does not fit."
    with tempfile.TemporaryDirectory() as folder:
        torch.save(small_vgg(width=6).state_dict(), f"{folder}/other.pt")
        refused("of another shape", lambda: load_weights(small_vgg(width=4), f"{folder}/other.pt"))


def test_shared_relu(images):
    "A ReLU that runs twice means its last call; the first one can be named."
    net = SharedReLU()
    r = regression_cam(net, images)
    assert find_gap_head(net, images) == ("relu", net.head)
    last = net.relu(net.b(net.relu(net.a(images)))).detach()
    w = net.head.weight[0].detach() / last[0, 0].numel()
    assert_close(r.moram, torch.einsum("k,bkhw->bhw", w.abs(), last))
    assert regression_cam(net, images, "relu#1").moram.shape == (3, 10, 10)


def test_functional_relu(images):
    "A ReLU that is written as a function is found, or can be named."

    class Functional(SharedReLU):
        def forward(self, x):
            return self.head(torch.relu(self.b(torch.relu(self.a(x)))).mean((2, 3)))

    net = Functional()
    assert find_gap_head(net, images) == ("relu()", net.head)
    for r in (regression_cam(net, images), regression_cam(net, images, "relu()")):
        assert_close(r.grad_ram.sum((1, 2)), r.output - net.head.bias.detach())


def test_densenet():
    "The last ReLU of a densenet is a call in the model's own forward: RAM exists there."
    x = torch.rand(2, 3, 64, 64)
    net = torchvision_model("densenet121", n_classes=1, fill=torch.rand(4, 3, 64, 64))
    assert find_gap_head(net, x) == ("relu()", net.classifier)
    r = regression_cam(net, x)
    assert_close(r.grad_ram.sum((1, 2)), r.output - net.classifier.bias.detach(), rtol=0, atol=1e-5)


def test_views_folded_into_the_batch_are_refused():
    "Maps of another number of examples than the input has would belong to nobody."

    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = gap_net()

        def forward(self, x):
            return self.net(x.flatten(0, 1)).reshape(len(x), -1).mean(1)

    refused("folds an axis into the batch", lambda: regression_cam(Views(), torch.rand(2, 4, 1, 12, 12), "net.1"))


def test_tokens_of_a_text_raise_a_doubt():
    "A text, (B T D), has as many axes as a signal, (B C L): a layer without a convolution is doubted, one with is not."
    with torch.random.fork_rng():
        torch.manual_seed(0)
        text = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Flatten(), nn.Linear(5 * 8, 2))
        signal = nn.Sequential(nn.Conv1d(5, 6, 2), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 7, 2))
    words = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match=r"tokens \(B T K\)"):
        regression_cam(text, words, "0", 0, abs_activations=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        by_token = regression_cam(text, words, "0", 0, abs_activations=True, reshape=lambda a: a.transpose(1, 2))
        assert by_token.moram.shape == (2, 5)
        assert regression_cam(signal, words, "1", 0).moram.shape == (2, 7)


def test_maps_under_autocast(images):
    "Maps are at least float32, whatever surrounds the call."
    net = gap_net()
    with torch.autocast("cpu", torch.bfloat16):
        r = regression_cam(net, images)
    assert r.moram.dtype == r.grad_ram.dtype == torch.float32
    assert_close(r.moram, torch.einsum("bk,bkhw->bhw", r.weights.abs(), regression_cam(net, images, return_activations=True).activations), rtol=0.05, atol=1e-3)
    refused("holds no example", lambda: regression_cam(net, images[:0]))
    refused("output", lambda: regression_cam(nn.Sequential(*net, Log()), -100 * torch.ones(2, 1, 12, 12), "2"))


class Log(nn.Module):
    "The logarithm of a number that may be negative."

    def forward(self, x):
        return torch.log(x - 1e6)


@pytest.mark.filterwarnings("ignore:the output does not depend")
def test_reshape_is_a_rearrangement(images):
    "A `reshape` that computes would give the map of another layer; one that moves numbers is the layer itself."
    net = gap_net()
    plain = regression_cam(net, images, "1")
    turned = regression_cam(net, images, "1", reshape=lambda a: a.transpose(2, 3))
    assert_close(turned.moram, plain.moram.transpose(1, 2))
    part = regression_cam(net, images, "1", reshape=lambda a: a[:, :, 2:])
    assert part.moram.shape == (3, plain.moram.shape[1] - 2, plain.moram.shape[2])
    for wrong in (torch.relu, lambda a: a - a.mean(1, keepdim=True), lambda a: a.flip(0), lambda a: torch.cat([a, a], 2)):
        with pytest.raises(ValueError, match="may permute and leave out"):
            regression_cam(net, images, "1", reshape=wrong)
