import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.batches.dataset import DamagedShardError
from pipelines.batches.fresh import fresh_documents


@pytest.fixture(scope="module")
def written(encoded, write_shards):
    """A data set of documents with these contents, cut into shards of a few."""

    def write(contents, each=3):
        rows = [encoded(f"id {number}", [number], content=content) for number, content in enumerate(contents)]
        return write_shards([("s", [rows[at : at + each]]) for at in range(0, len(rows), each)])

    return write


texts = st.lists(st.sampled_from("abcdefgh"), max_size=12)


@given(texts, texts)
def test_fresh_is_what_the_earlier_data_set_lacks_in_whatever_order_or_file(written, earlier, now):
    found = fresh_documents(written(now), written(earlier, each=2))
    assert found.tolist() == [content not in earlier for content in now]


def test_of_a_grown_data_set_the_end_is_fresh(written):
    assert np.flatnonzero(fresh_documents(written("abcdef"), written("abc"))).tolist() == [3, 4, 5]


def test_a_missing_shard_is_one_line(written):
    earlier = written("abc")
    next(earlier.glob("*.arrow")).unlink()
    with pytest.raises(DamagedShardError, match=r"shard-0\.arrow is missing: rebuild it"):
        fresh_documents(written("ab"), earlier)
