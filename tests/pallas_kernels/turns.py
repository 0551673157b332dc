"""Roles of a block that take turns in the emulator: who runs, who waits."""

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.pallas_kernels.emulator import Emulator


class Turns:
    """Roles of a block: threads of Python, of which one runs at a time."""

    def __init__(self, emulator: "Emulator", state: tuple[str, ...]):
        """Takes turns on an emulator, of which `state` belongs to each role."""
        self.emulator, self.state = emulator, state
        self.may_run: list[threading.Semaphore] = []
        self.ended: list[bool] = []
        self.now, self.idle, self.met, self.meetings = -1, 0, 0, 0
        self.error: BaseException | None = None

    def run(self, roles):
        """Runs condition and body of each to the end; from a role, beside others."""
        emulator, first = self.emulator, len(self.ended)

        def one(i, mask, body):
            self.may_run[i].acquire()
            emulator.mask, emulator.groups, emulator.uncommitted = mask, [], []
            emulator.products, emulator.started, self.now = [], [], i
            try:
                if not self.error and mask.any():
                    body()
            except BaseException as error:
                self.error = self.error or error
            self.ended[i], self.idle = True, 0
            if (after := self._after(i)) != i:
                self.may_run[after].release()

        threads = []
        for i, (mask, body) in enumerate(roles, start=first):
            self.may_run.append(threading.Semaphore(0))
            self.ended.append(False)
            threads.append(threading.Thread(target=one, args=(i, mask, body)))
            threads[-1].start()
        if self.now >= 0:
            while not all(self.ended[first : first + len(threads)]):
                self.give(waits=True)
            return
        before = {name: getattr(emulator, name) for name in self.state}
        self.may_run[first].release()
        for thread in threads:
            thread.join()
        for name, value in before.items():
            setattr(emulator, name, value)
        if self.error:
            raise self.error

    def _after(self, i: int) -> int:
        """The next role that has not ended."""
        count = len(self.ended)
        order = [(i + j) % count for j in range(1, count)]
        return next((j for j in order if not self.ended[j]), i)

    def give(self, waits=False):
        """Lets another role run until it gives back; there must be one, if it waits."""
        i, after = self.now, self._after(self.now)
        self.idle = self.idle + 1 if waits else 0
        stuck = after == i or self.idle > 2 * len(self.ended)
        assert not (waits and stuck), "it would wait forever"
        if after == i:
            return
        mine = {name: getattr(self.emulator, name) for name in self.state}
        self.may_run[after].release()
        self.may_run[i].acquire()
        for name, value in mine.items():
            setattr(self.emulator, name, value)
        self.now = i
        if self.error:
            raise self.error

    def meet(self):
        """A barrier of all threads."""
        self.met += self.emulator.mask.sum()
        self.idle, meeting = 0, self.meetings
        if self.met == self.emulator.threads:
            self.met, self.meetings = 0, self.meetings + 1
        while self.meetings == meeting:
            self.give(waits=True)
