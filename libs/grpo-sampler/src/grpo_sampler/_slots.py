"""The host's table of decoding slots: which sequence is where, what has finished, what is next. numpy only.

Every array has a leading axis N of shards (groups of devices that decode their own rows). `request` is the index of a
row in the batch of B sequences, -1 if the slot is empty; `unit_prompt` is the prompt that a unit holds.
"""

from collections import deque
from typing import NamedTuple

import numpy as np

from grpo_contracts import FinishReason
from grpo_sampler._config import ModelConfig
from grpo_sampler._table import Rows

_FEW_ROWS, _FEW_PRODUCTS = 16, 2**24


class Shape(NamedTuple):
    """One compiled size of a shard: decoding rows, units of shared prompts, and most rows per unit."""

    rows: int
    units: int
    share: int

    @property
    def aligned(self) -> bool:
        """Whether row r is always at place r, so that no gather is needed between rows and units."""
        return self.rows == self.units * self.share


def few_rows(config: ModelConfig, *, unroll: bool) -> int:
    """Rows of a shard below which halving saves hardly any time.

    On a CPU (`unroll`), the step of a tiny model is dominated by overhead, up to 16 rows with a million weights.
    Otherwise each halving pays off, down to one row.

    Args:
        config: the model.
        unroll: as for `Sampler`.
    Returns:
        1 to 16.
    """
    attention = 2 * config.head_size * (config.query_heads + config.kv_heads)
    weights = config.layers * config.width * (attention + 3 * config.mlp_width) + config.width * config.vocab_size
    return min(_FEW_ROWS, max(1, _FEW_PRODUCTS // weights)) if unroll else 1


def shapes_for(rows: int, group_size: int, levels: int, *, streaming: bool, few: int = 1) -> tuple[Shape, ...]:
    """The sizes that a draining batch passes through, largest first.

    While prompts stream, stragglers keep their units, so a quarter more units let new groups start. A small batch of
    rows from many groups keeps one copy of the prompt per row, but never more copies than the full batch.

    Args:
        rows: slots of a shard.
        group_size: samples of one prompt.
        levels: maximum number of sizes; each is half of the one before.
        streaming: whether prompts wait for a slot.
        few: from `few_rows`; with fewer than twice as many rows, the last size is a quarter.
    Returns:
        Shapes; all but the first are the same with and without streaming.
    """
    full = -(-rows // group_size)
    spare = full + max(1, full // 4) if group_size > 1 else rows
    shapes = [Shape(rows, spare if streaming else full, group_size)]
    size, last = rows, False
    while len(shapes) < levels and size > max(1, few // 4) and not last:
        last = size < 2 * few
        size = -(-size // (4 if last else 2))
        shapes.append(Shape(size, size, 1) if size <= spare else Shape(size, spare, group_size))
    return tuple(shapes)


class Finished(NamedTuple):
    """Sequences that have just ended."""

    request_F: np.ndarray
    length_F: np.ndarray
    finish_F: np.ndarray


class Fill(NamedTuple):
    """A prompt to be prefilled into a unit of a shard."""

    shard: int
    unit: int
    prompt: int


class Slots:
    """The table. `waiting` holds requests in order; request b is sample b % group_size of prompt b // group_size."""

    def __init__(
        self,
        shape: Shape,
        shards: int,
        group_size: int,
        prompts: np.ndarray,
        length_P: np.ndarray,
        prompt_id_P: np.ndarray,
        limit_B: np.ndarray,
        stop_table_AV: np.ndarray | None = None,
    ) -> None:
        self.shape, self.shards, self.group_size = shape, shards, group_size
        self._prompts, self._length_P, self._prompt_id_P, self._limit_B = prompts, length_P, prompt_id_P, limit_B
        count = len(length_P) * group_size
        self._stop_table_AV = stop_table_AV
        self.waiting = deque(range(count))
        self._fair = -(-count // shards)  # rows that a shard starts with, so that no device is idle
        N, S, U, _ = (shards, *shape)
        self.request = np.full((N, S), -1, np.int32)
        self.token = np.zeros((N, S), np.int32)
        self.emitted = np.zeros((N, S), np.int32)
        self.place = np.zeros((N, S), np.int32)
        self.match = np.zeros((N, S), np.int32)
        self.unit_prompt = np.full((N, U), -1, np.int32)

    @property
    def live(self) -> np.ndarray:
        """Which slots hold an unfinished sequence, bool [N, S]."""
        return self.request >= 0

    def seat(self) -> list[Fill]:
        """Moves waiting requests into free slots.

        Returns:
            The prompts that must be computed before the next step.
        """
        fills: list[Fill] = []
        for shard in range(self.shards):
            if not self.waiting:
                break
            fills += self._seat_shard(shard)
        return fills

    def _seat_shard(self, shard: int) -> list[Fill]:
        S, U, g = self.shape
        request, place, prompt_of = self.request[shard], self.place[shard], self.unit_prompt[shard]
        taken = np.zeros((U, g), bool)
        taken.reshape(-1)[place[request >= 0]] = True
        prompt_of[~taken.any(1)] = -1
        free = deque(np.flatnonzero(request < 0).tolist())
        fills: list[Fill] = []
        room = self._fair - (S - len(free))
        while self.waiting and free and room > 0:
            b = self.waiting[0]
            prompt = b // self.group_size
            open_units = np.flatnonzero((prompt_of == prompt) & ~taken.all(1))
            if not open_units.size:
                open_units = np.flatnonzero(prompt_of < 0)
                if not open_units.size:
                    break
                prompt_of[open_units[0]] = prompt
                fills.append(Fill(shard, int(open_units[0]), prompt))
            unit = int(open_units[0])
            seat = unit * g + int(np.argmin(taken[unit]))
            row = seat if self.shape.aligned else free[0]
            free.remove(row)
            taken[unit, seat - unit * g] = True
            request[row], place[row] = b, seat
            self.emitted[shard, row] = self.match[shard, row] = 0
            self.token[shard, row] = self._prompts[prompt, self._length_P[prompt] - 1]
            self.waiting.popleft()
            room -= 1
        return fills

    def rows(self, column_N: np.ndarray) -> Rows:
        """The table for the device; every field has a leading axis N.

        Args:
            column_N: the next column of each shard's ring.
        """
        N, U, g = self.shards, self.shape.units, self.shape.share
        live = self.live
        prompt = np.where(live, self.request // self.group_size, 0)
        row_of = np.zeros((N, U * g), np.int32)
        shard, row = np.nonzero(live)
        row_of[shard, self.place[shard, row]] = row
        return Rows(
            token_S=self.token,
            start_S=self._length_P[prompt] - 1,
            emitted_S=self.emitted,
            limit_S=self._limit_B[np.where(live, self.request, 0)],
            live_S=live * (1 + self.match),
            prompt_id_S=self._prompt_id_P[prompt],
            sample_S=np.where(live, self.request % self.group_size, 0),
            place_S=self.place,
            row_Ug=row_of,
            shared_length_U=np.where(self.unit_prompt >= 0, self._length_P[self.unit_prompt] - 1, 0),
            column=column_N,
        )

    def absorb(self, token_iS: np.ndarray, stop_ids: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, Finished]:
        """Records what a chunk emitted, and frees the slots of finished sequences.

        Args:
            token_iS: emitted tokens, -1 for none.
            stop_ids: ids that end a sequence.
        Returns:
            (request of each row before the chunk, tokens that it had emitted, sequences that ended in the chunk).
        """
        before_S, had_S = self.request.reshape(-1).copy(), self.emitted.reshape(-1).copy()
        count_S = (token_iS >= 0).sum(0)
        moved = np.flatnonzero(count_S)
        token, emitted, request = self.token.reshape(-1), self.emitted.reshape(-1), self.request.reshape(-1)
        token[moved] = token_iS[count_S[moved] - 1, moved]
        emitted[moved] += count_S[moved].astype(np.int32)
        stopped, matched = np.isin(token[moved], stop_ids), self._match(token_iS)[moved]
        ended = stopped | matched | (emitted[moved] >= self._limit_B[request[moved]])
        finish = np.select(
            [stopped, matched], [FinishReason.STOP, FinishReason.STOP_STRING], FinishReason.LENGTH
        ).astype(np.int8)
        rows = moved[ended]
        finished = Finished(request[rows].copy(), emitted[rows].copy(), finish[ended])
        request[rows] = -1
        return before_S, had_S, finished

    def _match(self, token_iS: np.ndarray) -> np.ndarray:
        """Advances the stop strings' automaton as the device did; which rows have completed a stop string."""
        match, table_AV = self.match.reshape(-1), self._stop_table_AV
        if table_AV is not None:
            for token_S in token_iS:
                rows = np.flatnonzero(token_S >= 0)
                match[rows] = table_AV[match[rows], token_S[rows]]
        return match < 0

    def shrink(self, shape: Shape) -> np.ndarray:
        """Moves to a smaller shape.

        Args:
            shape: a shape with at least as many rows as any shard has live ones.
        Returns:
            The old unit of each new unit, then the old row of each new row, by shard; indices are within the shard.
        """
        N = self.shards
        unit_src, row_src = np.zeros((N, shape.units), np.int32), np.zeros((N, shape.rows), np.int32)
        old = {name: getattr(self, name) for name in ("request", "token", "emitted", "match", "place", "unit_prompt")}
        share, self.shape = self.shape.share, shape
        self.request = np.full((N, shape.rows), -1, np.int32)
        self.token, self.emitted, self.match, self.place = (np.zeros((N, shape.rows), np.int32) for _ in range(4))
        self.unit_prompt = np.full((N, shape.units), -1, np.int32)
        for shard in range(N):
            rows = np.flatnonzero(old["request"][shard] >= 0)
            if shape.aligned:
                rows = rows[np.argsort(old["place"][shard, rows], kind="stable")]
            units_of = old["place"][shard, rows] // share
            units = units_of if shape.share == 1 else np.unique(units_of)
            row_src[shard, : len(rows)], unit_src[shard, : len(units)] = rows, units
            for name in ("request", "token", "emitted", "match"):
                getattr(self, name)[shard, : len(rows)] = old[name][shard, rows]
            self.unit_prompt[shard, : len(units)] = old["unit_prompt"][shard, units]
            self.place[shard, : len(rows)] = (
                np.arange(len(rows))
                if shape.share == 1
                else np.searchsorted(units, units_of) * share + old["place"][shard, rows] % share
            )
        return np.concatenate([unit_src, row_src], axis=1).reshape(-1)
