"""Which waiting requests may run now, and whose adapters get pages next.

Requests ask in their order of arrival, once a round. One whose adapters are all in pages may run. For the others, what
is on disk is read, and what has been read gets pages that are free or hold adapters which nobody waits for. When there
are none, the first request that finds none makes a claim: pages come free for it and for nobody else, and requests
behind it start no new work on the adapters that must make way. So each gets its turn, in order; those that hold pages
already go on meanwhile, and an adapter that is still being read holds up nobody.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from weft.adapters.tiers import AdapterVersion, Tiers
from weft.errors import InvalidRequest, OutOfCapacity


@dataclass(frozen=True, slots=True, eq=False)
class AdapterRef:
    """What a request holds: the name it asked for, the version that it got, and how often that had failed to move."""

    name: str
    version: AdapterVersion
    failures: int = 0


Refs = Sequence[AdapterRef]


@dataclass(frozen=True, slots=True)
class _Claim:
    """A request that waits for pages, and the versions that make way for it once nobody runs with them."""

    refs: Refs
    victims: frozenset[AdapterVersion] = frozenset()


class Round:
    """One pass over the requests that wait, in their order of arrival. Exists while the tiers' lock is held."""

    def __init__(self, tiers: Tiers, before: _Claim | None) -> None:
        """before: the claim of the round before; if its request still waits, the same versions make way for it."""
        self._tiers = tiers
        self._before = before
        self._kept: set[AdapterVersion] = set()
        self._somebody_reads = False
        self.claim: _Claim | None = None

    def ready(self, refs: Refs) -> bool:
        """Whether a request may run now; if not, what it needs is under way, or will be when its turn comes.

        Raises the error of a move that failed since the request came, and OutOfCapacity where pins leave it too little.
        """
        missing = [ref for ref in refs if ref.version.resident is None]
        if not missing:
            self._kept.update(ref.version for ref in refs)
            return self.claim is None or not any(ref.version in self.claim.victims for ref in refs)
        for ref in missing:
            if ref.version.failures > ref.failures and ref.version.failure is not None:
                raise ref.version.failure
        if self._all_read(missing) and self.claim is None:
            self._kept.update(ref.version for ref in refs)
            waiting = {ref.version for ref in missing if ref.version.moving_from is None}
            if waiting and self._find_pages(refs, sum(version.num_pages for version in waiting)):
                for version in waiting:
                    self._tiers.copy(version)
        return False

    def hold(self, refs: Refs) -> None:
        """Keep the pages of a request that is ready, until `let_go`."""
        for ref in refs:
            ref.version.active += 1
            self._tiers.use(ref.version)

    def _all_read(self, missing: Refs) -> bool:
        """Whether all are in host memory; if not, read: within the budget, but for the first one who needs it."""
        unread = [ref.version for ref in missing if ref.version.host is None]
        for version in unread:
            if version.moving_from is None and (not self._somebody_reads or self._tiers.may_read):
                self._tiers.read(version)
        self._somebody_reads |= bool(unread)
        return not unread

    def _find_pages(self, refs: Refs, num_pages: int) -> bool:
        """Have so many free pages, or else claim them."""
        tiers = self._tiers
        idle = [version for version in tiers.on_device() if version.may_leave_device]
        if tiers.make_room(num_pages, (version for version in idle if not version.is_wanted)):
            return True
        others = [version for version in idle if version not in self._kept]
        if tiers.make_room(num_pages, sorted(others, key=lambda version: version.is_wanted)):
            return True
        check_fit(tiers, {ref.version for ref in refs})
        self.claim = _Claim(refs, self._choose_victims(refs, num_pages - tiers.num_free_pages))
        return False

    def _choose_victims(self, refs: Refs, num_pages: int) -> frozenset[AdapterVersion]:
        """Those chosen before, so that they drain, then those that the fewest requests run with."""
        before = self._before.victims if self._before is not None and self._before.refs is refs else frozenset()
        able = [version for version in self._tiers.on_device() if not version.pins and version not in self._kept]
        victims: set[AdapterVersion] = set()
        for version in sorted(able, key=lambda version: (version not in before, version.active)):
            if num_pages <= 0:
                break
            victims.add(version)
            num_pages -= version.num_pages
        return frozenset(victims)


class Residency:
    """What the engine asks before it runs a request, and tells when it stops to. For one thread, the engine's."""

    def __init__(self, tiers: Tiers) -> None:
        self._tiers = tiers
        self._claim: _Claim | None = None

    @contextmanager
    def round(self) -> Iterator[Round]:
        """Holds the tiers' lock: for a short time, once a step."""
        with self._tiers.lock:
            this = Round(self._tiers, self._claim)
            yield this
            self._set_claim(this.claim)

    def let_go(self, refs: Refs) -> None:
        """Undo `hold`."""
        with self._tiers.lock:
            for ref in refs:
                ref.version.active -= 1
                self._tiers.use(ref.version)

    def forget(self, ref: AdapterRef) -> None:
        """A request ended; if it had claimed pages, it needs them no more."""
        if self._claim is not None and ref in self._claim.refs:
            self._set_claim(None)

    def _set_claim(self, claim: _Claim | None) -> None:
        self._claim = claim
        self._tiers.pages_are_claimed = claim is not None


def check_mixable(refs: Refs) -> None:
    """Raises InvalidRequest where what an adapter does can't be weighted, or added to what others do."""
    whole = [ref.name for ref in refs if not ref.version.is_sum]
    if whole:
        raise InvalidRequest.of(
            "adapters",
            f"{', '.join(whole)} has parts that no weight can scale (DoRA, biases, weights of its own, experts, "
            "bottlenecks): use it alone, by adapter_id",
        )


def check_fit(tiers: Tiers, versions: set[AdapterVersion]) -> None:
    """Raises InvalidRequest where versions can't be on the device together, OutOfCapacity where pins prevent it."""
    num_pages = sum(version.num_pages for version in versions)
    if num_pages > tiers.num_pages:
        raise InvalidRequest.of(
            "adapters",
            f"need {num_pages} pages at once, and there are {tiers.num_pages}: use fewer or smaller adapters in one "
            f"request, or start the server with --adapter-pages {num_pages} or more",
        )
    # Not those of pins that are asked for and may yet be refused: `pages_pinned` has them too.
    pinned = sum(other.num_pages for other in tiers.on_device() if other.pins and other not in versions)
    if num_pages > tiers.num_pages - pinned:
        raise OutOfCapacity(
            f"the request's adapters need {num_pages} pages; of {tiers.num_pages}, {pinned} are pinned by "
            "others: unpin some, or start the server with a larger --adapter-pages"
        )
