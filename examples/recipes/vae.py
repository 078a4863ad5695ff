"""A variational autoencoder of digits: the reconstruction and the KL to the prior.

python examples/recipes/vae.py        # writes results/vae.json in about a minute
"""

import torch
from compare import compare, digits, weighted
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

from steer_optim import PCD, Steer, SteeredOptimizer, Sum

METHODS = {
    "plain sum": Sum(),
    "`3 * reconstruction + kl`": weighted("reconstruction"),
    '`Steer("reconstruction")`': Steer("reconstruction"),
    '`PCD("reconstruction")`': PCD("reconstruction"),
    '`Steer("kl")`': Steer("kl"),
}
LATENT = 8


def losses(encoder, decoder, x):
    """The two parts of the negative evidence lower bound, in nats per image, and the KL of each latent."""
    mean, log_variance = encoder(x).chunk(2, dim=1)
    z = mean + (log_variance / 2).exp() * torch.randn_like(mean)
    kl = (mean.square() + log_variance.exp() - 1 - log_variance).mean(0) / 2
    reconstruction = binary_cross_entropy_with_logits(decoder(z), x, reduction="none").sum(1).mean()
    return {"reconstruction": reconstruction, "kl": kl.sum()}, kl


def train(rule, *, steps):
    encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 2 * LATENT))
    decoder = nn.Sequential(nn.Linear(LATENT, 128), nn.ReLU(), nn.Linear(128, 64))
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=1e-3)
    optimizer = SteeredOptimizer(optimizer, rule)
    images, _ = digits(held_out=False)
    for _ in range(steps):
        x = images[torch.randint(len(images), (128,))]
        optimizer.zero_grad()
        parts, _ = losses(encoder, decoder, x)
        optimizer.backward_components(parts)
        optimizer.step()
    torch.manual_seed(0)
    images, _ = digits(held_out=True)
    with torch.no_grad():
        parts, kl = losses(encoder, decoder, images.repeat(20, 1))
    return {
        "reconstruction, nats": parts["reconstruction"].item(),
        "KL, nats": parts["kl"].item(),
        "negative ELBO, nats": sum(parts.values()).item(),
        "latents in use": (kl > 0.05).sum().item(),
    }


if __name__ == "__main__":
    compare(__file__, train, METHODS, steps=1200)
