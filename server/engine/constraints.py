"""What an answer must match: compiled once, then one matcher an answer says which tokens may come next."""

from __future__ import annotations

from typing import Protocol


class Constraint(Protocol):
    """A compiled constraint; may be shared by any number of answers."""
