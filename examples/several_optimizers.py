"""Several optimizers and one steering, or one each: Muon with AdamW, an encoder with its decoder, a GAN.

    python examples/several_optimizers.py        # trains each for a few hundred steps, in seconds

Each function returns the losses and the last geometry. A checkpoint holds the `state_dict()` of every `Steering` beside
those of the optimizers.
"""

import torch
from torch import nn

from steer_optim import Steer, Steering


def muon_and_adamw(steps=200):
    """One network: Muon steps on its matrices and AdamW on its biases, and one rule weighs the gradients of both."""
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 2))
    matrices = [p for p in model.parameters() if p.ndim == 2]
    biases = [p for p in model.parameters() if p.ndim == 1]
    steering = Steering(model.parameters(), Steer(toward="main"))
    optimizers = [torch.optim.Muon(matrices, lr=2e-3), torch.optim.AdamW(biases, lr=2e-3)]
    history = []
    for _ in range(steps):
        x = torch.randn(64, 8)
        main, side = model(x).T
        losses = {"main": (main - x[:, 0].sin()).square().mean(), "side": (main + side + x[:, 1]).square().mean()}
        steering.zero_grad()
        steering.backward_components(losses)
        for optimizer in optimizers:
            optimizer.step()
        history.append(losses["main"].item())
    return history, steering.geometry


def encoder_and_decoder(steps=200):
    """Two optimizers over one loss of two parts: steered towards the reconstruction, and small codes come second."""
    encoder, decoder = nn.Linear(16, 4), nn.Linear(4, 16)
    steering = Steering([*encoder.parameters(), *decoder.parameters()], Steer(toward="reconstruction"))
    optimizers = [torch.optim.Adam(encoder.parameters(), lr=1e-2), torch.optim.SGD(decoder.parameters(), lr=1e-1)]
    mixing = torch.randn(4, 16)
    history = []
    for _ in range(steps):
        x = torch.randn(64, 4) @ mixing / 2
        code = encoder(x)
        losses = {"reconstruction": (decoder(code) - x).square().mean(), "size": 0.1 * code.square().mean()}
        steering.zero_grad()
        steering.backward_components(losses)
        for optimizer in optimizers:
            optimizer.step()
        history.append(losses["reconstruction"].item())
    return history, steering.geometry


def generator_and_discriminator(steps=400):
    """Two networks with losses of their own, which share a graph: each has a steering, and leaves the other's alone."""
    generator = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 1))
    discriminator = nn.Sequential(nn.Linear(1, 32), nn.ReLU(), nn.Linear(32, 1))
    judge = Steering(discriminator.parameters(), Steer(toward="real"))
    forger = Steering(generator.parameters(), Steer(toward="fool"))
    optimizers = [torch.optim.Adam(net.parameters(), lr=2e-3, betas=(0.5, 0.9)) for net in (discriminator, generator)]
    score = nn.functional.softplus
    history = []
    for _ in range(steps):
        real, fake = 2 + 0.5 * torch.randn(128, 1), generator(torch.randn(128, 4))
        judge.zero_grad()
        judge.backward_components(
            {"real": score(-discriminator(real)).mean(), "fake": score(discriminator(fake.detach())).mean()}
        )
        optimizers[0].step()
        forger.zero_grad()
        forger.backward_components({"fool": score(-discriminator(fake)).mean(), "spread": (fake.std() - 0.5).square()})
        optimizers[1].step()
        history.append((fake.mean() - 2).abs().item())
    return history, forger.geometry


def main():
    torch.manual_seed(0)
    for train in (muon_and_adamw, encoder_and_decoder, generator_and_discriminator):
        history, geometry = train()
        first, second = geometry.names
        angle = geometry.angle(first, second)
        print(
            f"{train.__name__:28} {history[0]:.3f} -> {history[-1]:.3f}, {first} and {second} {angle:.0f} degrees apart"
        )


if __name__ == "__main__":
    main()
