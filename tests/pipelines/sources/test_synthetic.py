import pytest

from pipelines.config import Recall
from pipelines.sources.corpus import Document
from pipelines.sources.recall import recall_document
from pipelines.sources.synthetic import SYNTHETIC, recall_names, synthetic_text


def test_a_path_says_all_that_the_text_is_made_from():
    names = list(recall_names(Recall(documents=3, characters=5000, distance=(0.00001, 0.75)), -7))
    assert len(set(names)) == 3
    assert synthetic_text(SYNTHETIC + names[2]) == recall_document(-7, 2, 5000, (0.00001, 0.75))


def test_recall_documents_are_a_corpus_labelled_by_their_ids(read):
    documents = read("synthetic:recall", seed=4, recall={"documents": 12, "characters": 4000})
    assert [document.text for document in documents] == [recall_document(4, number, 4000) for number in range(12)]
    assert all(isinstance(document, Document) and document.source == "s" for document in documents)
    assert all(document.id.startswith("synthetic/recall-") for document in documents)
    assert documents == read("synthetic:recall", seed=4, recall={"documents": 12, "characters": 4000})
    fewer = read("synthetic:recall", seed=4, recall={"documents": 5, "characters": 4000})
    assert documents[:5] == fewer, "a source that gets more documents grows"


@pytest.mark.parametrize("change", [{"seed": 1}, {"characters": 5000}, {"distance": (0.5, 1.0)}])
def test_every_setting_gives_other_documents(read, change):
    settings = {"seed": 0, "characters": 4000, "distance": (0.25, 1.0)}
    first, other = (
        {
            each.id: each.text
            for each in read(
                "synthetic:recall",
                seed=given["seed"],
                recall={"documents": 2, "characters": given["characters"], "distance": given["distance"]},
            )
        }
        for given in (settings, {**settings, **change})
    )
    assert not first.keys() & other.keys()
    assert not set(first.values()) & set(other.values())
