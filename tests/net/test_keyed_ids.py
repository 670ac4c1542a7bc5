"""Ids that are told from made-up ones."""

import attrs

from ztna.net.keyed_ids import ID_SIZE, OUR_IDS, Given, HashKey, IdKeys

FIXED = IdKeys(
    {
        Given.TO_ANYBODY: HashKey(0x243F_6A88, 0x85A3_08D3, 0x1319_8A2F),
        Given.TO_PEERS: HashKey(0xA409_3823, 0x299F_31D1, 0x082E_FA99),
    }
)


def test_made_ids_are_known() -> None:
    for kind in Given:
        ids = {OUR_IDS.make(kind) for _ in range(1000)}
        assert len(ids) == 1000
        assert {len(each) for each in ids} == {ID_SIZE}
        # One in 65,536 of either kind looks like the other, too.
        assert sum(OUR_IDS.given(each) is kind for each in ids) >= 998


def test_ids_of_another_process_are_unknown() -> None:
    ids = [IdKeys().make(Given.TO_PEERS) for _ in range(1000)]
    assert sum(FIXED.given(each) is not None for each in ids) <= 3


def test_an_id_with_a_changed_bit_is_unknown() -> None:
    ids = [FIXED.make(Given.TO_PEERS) for _ in range(64)]
    changed = [
        (int.from_bytes(each, "big") ^ 1 << bit).to_bytes(ID_SIZE, "big")
        for each in ids
        for bit in range(64)
    ]
    assert sum(FIXED.given(each) is not None for each in changed) <= 4


def test_the_check_spreads() -> None:
    key = FIXED.keys[Given.TO_PEERS]
    assert len({key.check(number, 0) for number in range(4096)}) > 3900
    assert len({key.check(0, number) for number in range(4096)}) > 3900


def test_only_ids_of_our_size_are_ours() -> None:
    one = FIXED.make(Given.TO_PEERS)
    assert FIXED.given(one) is Given.TO_PEERS
    assert FIXED.given(one[:-1]) is None
    assert FIXED.given(one + b"\0") is None


def test_keys_are_not_shown() -> None:
    assert str(attrs.astuple(FIXED.keys[Given.TO_PEERS])[0]) not in repr(FIXED)
    assert "mask" not in repr(FIXED.keys[Given.TO_PEERS])
