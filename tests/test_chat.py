"""What a user reads while a response is drawn is what sampling draws."""
import pytest
import torch

from sample import generate
from tiny import tiny_model
from tools.chat import Config, stream


@pytest.mark.parametrize("temperature, top_p, top_k", [(0.0, 1.0, 0), (1.0, 0.8, 5)])
def test_a_stream_is_what_generate_draws(temperature, top_p, top_k):
    """Token by token, the same responses; gradients are on again afterwards."""
    model, prompt = tiny_model(), [1, 5, 9, 4]
    options = dict(max_new_tokens=20, temperature=temperature, top_p=top_p, top_k=top_k, seed=7)
    [responses] = generate(model, [prompt], num_samples=3, eos_id=2, **options)
    streams = [list(stream(model, prompt, n, 2, Config(model="m", **options))) for n in range(3)]
    assert streams == [response.ids for response in responses]
    assert torch.is_grad_enabled()
