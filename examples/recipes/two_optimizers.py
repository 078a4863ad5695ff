"""Several optimizers and one steering, or one each: Muon with AdamW, an encoder with its decoder, a GAN.

python examples/recipes/two_optimizers.py        # writes results/two_optimizers.json in about a minute
"""

import torch
from compare import compare, weighted
from torch import nn
from torch.nn.functional import softplus

from steer_optim import Steer, Steering, Sum

METHODS = {"plain sum": lambda main: Sum(), "`3 * main + side`": weighted, "`Steer(main)`": Steer}


def descend(steering, optimizers, losses, draw, steps):
    """Train with several optimizers over one loss of two parts; return the losses on fresh data."""
    for _ in range(steps):
        steering.zero_grad()
        steering.backward_components(losses(draw(64)))
        for optimizer in optimizers:
            optimizer.step()
    return losses(draw(10_000))


def muon_and_adamw(rule, steps):
    """Train one network: Muon steps on its matrices and AdamW on its biases."""
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 2))
    matrices, biases = ([p for p in model.parameters() if p.ndim == dim] for dim in (2, 1))
    optimizers = [torch.optim.Muon(matrices, lr=2e-3), torch.optim.AdamW(biases, lr=2e-3)]

    def losses(x):
        main, side = model(x).T
        return {"main": (main - x[:, 0].sin()).square().mean(), "side": (main + side + x[:, 1]).square().mean()}

    steering = Steering(model.parameters(), rule("main"))
    return descend(steering, optimizers, losses, lambda n: torch.randn(n, 8), steps)["main"].item()


def encoder_and_decoder(rule, steps):
    """Train two networks on a reconstruction, which matters most, and on small codes."""
    encoder, decoder, mixing = nn.Linear(16, 4), nn.Linear(4, 16), torch.randn(4, 16)
    optimizers = [torch.optim.Adam(encoder.parameters(), lr=1e-2), torch.optim.SGD(decoder.parameters(), lr=1e-1)]

    def losses(x):
        code = encoder(x)
        return {"main": (decoder(code) - x).square().mean(), "size": 0.1 * code.square().mean()}

    steering = Steering([*encoder.parameters(), *decoder.parameters()], rule("main"))
    return descend(steering, optimizers, losses, lambda n: torch.randn(n, 4) @ mixing / 2, steps)["main"].item()


def generator_and_discriminator(rule, steps):
    """Two networks with losses of their own, which share a graph: each has a steering, and leaves the other's alone."""
    generator = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 1))
    discriminator = nn.Sequential(nn.Linear(1, 32), nn.ReLU(), nn.Linear(32, 1))
    judge, forger = Steering(discriminator.parameters(), rule("real")), Steering(generator.parameters(), rule("fool"))
    optimizers = [torch.optim.Adam(net.parameters(), lr=2e-3, betas=(0.5, 0.9)) for net in (discriminator, generator)]
    for _ in range(steps):
        real, fake = 2 + 0.5 * torch.randn(128, 1), generator(torch.randn(128, 4))
        scores = {"real": softplus(-discriminator(real)).mean(), "fake": softplus(discriminator(fake.detach())).mean()}
        judge.zero_grad()
        judge.backward_components(scores)
        optimizers[0].step()
        fooling = {"fool": softplus(-discriminator(fake)).mean(), "spread": (fake.std() - 0.5).square()}
        forger.zero_grad()
        forger.backward_components(fooling)
        optimizers[1].step()
    real, fake = 2 + 0.5 * torch.randn(10_000, 1), generator(torch.randn(10_000, 4))
    return (real.sort(0)[0] - fake.sort(0)[0]).abs().mean().item()  # the Wasserstein distance


def train(rule, *, steps):
    settings = (muon_and_adamw, encoder_and_decoder, generator_and_discriminator)
    return {f"{part.__name__.replace('_', ' ')}, × 1000": 1000 * part(rule, steps) for part in settings}


if __name__ == "__main__":
    compare(__file__, train, METHODS, steps=500)
