from __future__ import annotations

from collections import Counter

import pytest
import torch

import fastpose
from fastpose.counting import count_parameters
from fastpose.models._registry import model_entry
from fastpose.models.lightweight_hrnet import CEM_ORDER, LITE_CONVS, ChannelExchange, LiteConvModule
from tests.models.published import macs_by_output

WIDTHS = {-2: (24, 32, 96, 264), -1: (24, 40, 104, 288), 0: (24, 40, 112, 320)}
SIZES = (448, 480, 512)


def exchange_origins(widths: tuple[int, ...], mode: str) -> list[list[tuple[int, int]]]:
    """Where the channels of A'1 to A'4 come from, as (map, channel) from 0 on."""
    maps = []
    for n, width in enumerate(widths):
        channel = torch.arange(width, dtype=torch.float32).view(1, -1, 1, 1)
        maps.append((1000 * n + channel).expand(1, width, 8 >> n, 8 >> n))
    exchanged = ChannelExchange(widths, mode)(maps)
    assert [tuple(m.shape) for m in exchanged] == [(1, width, 8, 8) for width in widths]
    assert all(torch.equal(m, m[:, :, :1, :1].expand_as(m)) for m in exchanged)
    return [[divmod(int(v), 1000) for v in m[0, :, 0, 0]] for m in exchanged]


@pytest.mark.parametrize(
    "mode, table",
    [
        ("all", [[6, 8, 10, 0], [0, 0, 14, 18], [6, 8, 24, 58], [12, 16, 48, 188]]),  # Table III
        ("half", [[12, 0, 12, 0], [0, 20, 0, 12], [3, 4, 60, 29], [9, 8, 24, 223]]),  # Table IV
    ],
)
def test_exchange_is_the_papers_table(mode, table):
    origins = exchange_origins(WIDTHS[-2], mode)
    assert [[Counter(n for n, _ in row)[m] for m in range(4)] for row in origins] == table


@pytest.mark.parametrize("mode", CEM_ORDER)
@pytest.mark.parametrize("r", WIDTHS)
def test_exchange_moves_every_channel_once(r, mode):
    origins = exchange_origins(WIDTHS[r], mode)
    assert sorted(sum(origins, [])) == [(n, c) for n, width in enumerate(WIDTHS[r]) for c in range(width)]
    if mode == "half":
        for n, (row, width) in enumerate(zip(origins, WIDTHS[r], strict=True)):
            assert row[width // 2 :] == [(n, c) for c in range(width // 2, width)]


def test_exchange_goes_through_the_nearest_pixel():
    widths = (8, 8, 8, 8)
    maps = [torch.randn(2, 8, 16 >> n, 24 >> n) for n in range(4)]
    origins = exchange_origins(widths, "half")
    for row, result in zip(origins, ChannelExchange(widths, "half")(maps), strict=True):
        for channel, (n, c) in enumerate(row):
            for y, x in ((0, 0), (5, 9), (15, 23)):
                assert torch.equal(result[:, channel, y, x], maps[n][:, c, y >> n, x >> n])


@pytest.mark.parametrize("size", SIZES)
def test_published_cost(size):
    published = model_entry(f"lightweight_hrnet_{size}").published[0]
    with torch.device("meta"):
        model = fastpose.create_model(f"lightweight_hrnet_{size}")
        off = fastpose.create_model(f"lightweight_hrnet_{size}", cem="off")
    assert round(count_parameters(model) / 1e6, 1) == published.parameters
    macs = macs_by_output(model, size)
    assert macs / 1e9 == pytest.approx(published.gflops, rel=0.006)
    # Table VI: the exchange adds neither parameters nor multiply-accumulates
    assert (count_parameters(off), macs_by_output(off, size)) == (count_parameters(model), macs)


@pytest.mark.parametrize(
    "changes, parameters, gflops",
    [
        ({"lite_conv": "shufflenet"}, 5.749, 5.367),
        ({"lite_conv": "separable"}, 5.736, 5.348),
        ({"lite_conv": "grouped"}, 5.734, 5.344),
        ({"between": False}, 5.922, 5.373),
        ({"modules": (2, 3)}, 6.031, 5.898),
        ({"head_blocks": 1}, 5.934, 5.074),
        ({"cem": "all"}, 5.942, 5.472),
    ],
)
def test_options(changes, parameters, gflops):
    with torch.device("meta"):
        model = fastpose.create_model("lightweight_hrnet_448", **changes)
    assert round(count_parameters(model) / 1e6, 3) == parameters
    assert round(macs_by_output(model, 448) / 1e9, 3) == gflops


@pytest.mark.parametrize("changes", [{"cem": "off"}, {"cem": "all"}, {"between": False}, {"lite_conv": "shufflenet"}])
def test_options_run_and_script(changes):
    model = fastpose.create_model("lightweight_hrnet_448", num_keypoints=3, head_blocks=0, **changes).eval()
    x = torch.randn(1, 3, 32, 64)
    with torch.no_grad():
        maps, heatmaps = model(x)
        assert maps.shape == (1, 6, 8, 16) and heatmaps.shape == (1, 3, 16, 32)
        for got, expected in zip(torch.jit.script(model)(x), (maps, heatmaps), strict=True):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("kind", LITE_CONVS)
def test_lite_conv_module(kind):
    module = LiteConvModule(16, 24, kind).eval()
    x = torch.randn(2, 16, 8, 12)
    y = module(x)
    assert y.shape == (2, 24, 4, 6)
    # every second channel is the first half of the shuffled first stage, untouched by the second
    first = torch.cat([module.keep(x), module.add(x)], 1)
    shuffled = torch.stack([first[:, :12], first[:, 12:]], 2).flatten(1, 2)
    assert torch.equal(y[:, 0::2], shuffled[:, :12])
    torch.testing.assert_close(y[:, 1::2], module.refine(shuffled[:, 12:]))
    if kind == "dense":
        assert count_parameters(module) == 4824


def test_wrong_options_say_what_is_expected():
    for changes, message in (
        ({"r": 1}, "r must be 0 or negative, got 1"),
        ({"lite_conv": "ghost"}, "lite_conv must be one of dense, .*, grouped, got 'ghost'"),
        ({"cem": "on"}, "cem must be 'half', 'all' or 'off', got 'on'"),
        ({"modules": (1, 0)}, r"modules must have 2 positive entries, .* got \(1, 0\)"),
        ({"head_blocks": -1}, "head_blocks must not be negative, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            fastpose.create_model("lightweight_hrnet_448", **changes)
