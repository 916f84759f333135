"""Made-up documents as files: each has a path of its own, which says all that its text is made from."""

from collections.abc import Iterator

from pipelines.config import Recall
from pipelines.sources.recall import VERSION, recall_document

SYNTHETIC = "synthetic:"
RECALL_DOCUMENT = "recall-"
TAG = f"recall {VERSION}"  # with a document's name it names the content


def recall_names(settings: Recall, seed: int) -> Iterator[str]:
    """The names of a source's documents, in order: a larger number of documents begins with those of a smaller."""
    least, most = settings.distance
    for number in range(settings.documents):
        yield f"{RECALL_DOCUMENT}{settings.characters}_{least}_{most}_{seed}_{number:06}"


def is_synthetic(path: str) -> bool:
    return path.startswith(SYNTHETIC)


def synthetic_text(path: str) -> str:
    """The text of the document at SYNTHETIC + its name."""
    characters, least, most, seed, number = path.removeprefix(SYNTHETIC + RECALL_DOCUMENT).split("_")
    return recall_document(int(seed), int(number), int(characters), (float(least), float(most)))
