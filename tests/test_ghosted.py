"""experiments/ghosted.py: the map at a cut, against least squares."""

import copy

import torch

from come.models.adapter import ModelAdapter
from come.models.surgery import remove_layers
from come.stream.stream import LayerStream
from tests.commands import load_script
from tests.conftest import VOCAB, pico


@torch.no_grad()
def test_map_at_the_cut():
    ghosted, model = load_script("ghosted"), pico("llama_gqa")
    windows = torch.randint(3, VOCAB, (12, 16), generator=torch.Generator().manual_seed(3))
    hidden = model(windows, output_hidden_states=True).hidden_states
    x, y = (hidden[index].flatten(0, 1).double() for index in (2, 4))
    with LayerStream(ModelAdapter(model), windows, progress=False) as stream:
        stream.embed()
        stream.advance(0, stream.num_layers - 1)
        change = ghosted.fitted_map(stream, 2, 2)
        angles = [
            torch.nn.functional.cosine_similarity(
                hidden[first][:, -1], hidden[first + 2][:, -1], dim=-1
            )
            .arccos()
            .mean()
            for first in range(4)
        ]
        assert ghosted.cheapest_block(stream, 2) == int(torch.stack(angles).argmin())
    expected = torch.linalg.lstsq(x, y - x).solution
    torch.testing.assert_close(x @ change, x @ expected, rtol=1e-3, atol=1e-4)
    following = model.model.layers[4]
    plain = copy.deepcopy(following)
    remove_layers(model.model.layers, model.config, [2, 3])
    ghosted.put_before(following, change)
    after = model(windows, output_hidden_states=True).hidden_states
    torch.testing.assert_close(after[2], hidden[2])  # the input of the block, before the map
    mapped = (x + x @ change).float().view_as(after[2])
    position = torch.arange(16)[None]
    expected = plain(mapped, position_embeddings=model.model.rotary_emb(mapped, position))
    torch.testing.assert_close(after[3], expected, rtol=1e-4, atol=1e-4)
