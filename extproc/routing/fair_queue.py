"""The order in which requests leave a queue: by priority, and fair between tenants.

A class is served before all below it. Within a class the tenants take turns, and each tenant's
requests leave in the order of their arrival. So one tenant with many requests delays the others
by one request each, not by all of them. When the queue is full, a request takes the place of the
newest one of the tenant that has most requests in the lowest class.
"""

from collections import OrderedDict
from typing import Generic, TypeVar

__all__ = ["FairQueue"]

ItemT = TypeVar("ItemT")


class FairQueue(Generic[ItemT]):
    """Items of tenants in classes, of which 0 is served first; each item occurs once."""

    __slots__ = ("_classes", "_places")

    def __init__(self, classes: int) -> None:
        # Of each class: the tenants in the order of their turns, and the items of each, oldest
        # first. An OrderedDict gives the first and the last item, and drops any, in O(1).
        self._classes: list[OrderedDict[str, OrderedDict[ItemT, None]]] = [
            OrderedDict() for _ in range(classes)
        ]
        self._places: dict[ItemT, tuple[int, str]] = {}

    def __len__(self) -> int:
        return len(self._places)

    def push(self, item: ItemT, priority: int, tenant: str) -> None:
        """Add an item; `priority` is the number of its class."""
        self._classes[priority].setdefault(tenant, OrderedDict())[item] = None
        self._places[item] = (priority, tenant)

    def pop(self) -> ItemT:
        """Take the item whose turn it is; raises IndexError if the queue is empty."""
        for tenants in self._classes:
            if tenants:
                tenant, items = next(iter(tenants.items()))
                item = next(iter(items))
                tenants.move_to_end(tenant)
                self.remove(item)
                return item
        raise IndexError

    def remove(self, item: ItemT) -> bool:
        """Drop an item; returns False if it is not here."""
        place = self._places.pop(item, None)
        if place is None:
            return False
        priority, tenant = place
        items = self._classes[priority][tenant]
        del items[item]
        if not items:
            del self._classes[priority][tenant]
        return True

    def least_entitled(self) -> ItemT | None:
        """The item that makes room when there are too many; None if the queue is empty."""
        for tenants in reversed(self._classes):
            if tenants:
                items = max(tenants.values(), key=len)
                return next(reversed(items))
        return None
