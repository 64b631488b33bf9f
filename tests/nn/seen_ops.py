"""Which of our ops a call runs."""

from torch.utils._python_dispatch import TorchDispatchMode


class _Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "maskmoe":
            self.ops.append(function.__name__.removesuffix(".default"))
        return function(*args, **(kwargs or {}))


def ops_of(call):
    """Their names, in order."""
    with _Seen() as seen:
        call()
    return seen.ops
