"""Random draws as pure functions of (seed, stream, position): they do not depend on what was drawn
before, on the number of workers or on that of processes."""
import numpy as np
import torch


def mix(*key):
    """A 63-bit seed from ints and strings; neighbouring keys give unrelated streams."""
    words = [byte for part in key for byte in (str(part) + "/").encode()]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0]) >> 1


class Random:
    """Draws for a batch that may be shared out over processes.

    Every process sees the same global batch of numbers and takes its own rows, so that N processes
    train exactly as one with the same global batch.
    """

    def __init__(self, key=(0,), device="cpu", rank=0, world=1):
        self.generator = torch.Generator(device=device).manual_seed(mix(*key))
        self.device = device
        self.rank = rank
        self.world = world

    def uniform(self, batch, *shape):
        """U[0, 1), [batch, *shape]: one draw per sample."""
        return self._rows(torch.rand, batch, shape)

    def normal(self, batch, *shape):
        """N(0, 1), [batch, *shape]: one draw per sample."""
        return self._rows(torch.randn, batch, shape)

    def shared(self, *shape):
        """U[0, 1), [*shape]: the same numbers on every process (one draw for the whole batch)."""
        return torch.rand(shape, generator=self.generator, device=self.device)

    def _rows(self, draw, batch, shape):
        numbers = draw((batch * self.world, *shape), generator=self.generator, device=self.device)
        return numbers[self.rank * batch:(self.rank + 1) * batch]
