"""A hundred labels among 1437 digits: the semi-supervised VAE against the same classifier alone."""

from __future__ import annotations

import pyro_lvm as lvm


def main(epochs: int = 60) -> tuple[float, float]:
    """Test error with the unlabelled images, and without them."""
    data = lvm.datasets.digits()
    y = lvm.datasets.hide_labels(data.train.y, keep=100, seed=0)
    errors = []
    for x, labels in ((data.train.x, y), (data.train.x[y >= 0], y[y >= 0])):
        ssvae = lvm.SemiSupervisedVAE(64, num_classes=10, latent_dim=10, hidden=(200,), likelihood="normal")
        lvm.fit(ssvae, (x, labels), steps=epochs * 15, batch_size=min(100, len(x)), seed=0)
        wrong = ssvae.classify(data.test.x).argmax(-1) != data.test.y
        errors.append(wrong.double().mean().item())
    with_them, without = (f"{100 * error:.1f} %" for error in errors)
    print(f"test error with 100 labels: {with_them} with the unlabelled images, {without} without")
    return errors[0], errors[1]


if __name__ == "__main__":
    main()
