import csv
import importlib.metadata
import json

import pytest

from pipelines.sources.corpus import Document, Dropped
from pipelines.sources.distributions import find_distributions, site_packages
from pipelines.workflow.errors import UserError

CODE = {"a/__init__.py": "import a", "a/deep/x.py": "x = 1", "a/data.json": "{}", "a.py": "pass"}


@pytest.fixture
def site(tmp_path, monkeypatch):
    """An environment's site-packages, empty."""
    site = tmp_path / "site-packages"
    site.mkdir()
    monkeypatch.setattr("pipelines.sources.listing.site_packages", lambda: (str(site), str(site)))
    return site


@pytest.fixture
def install(site, write_tree):
    """Put a distribution there. `record`: the names in its RECORD, those of the files if not given."""

    def put(name, files, *, version="1.0", metadata="License-Expression: MIT\n", record=None, **more):
        write_tree(site, files)
        place = f"{name}-{version}.dist-info"
        written = [[each, "", ""] for each in (files if record is None else record)]
        (site / place).mkdir()
        with open(site / place / "RECORD", "w", newline="") as file:
            csv.writer(file).writerows(written)
        head = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        write_tree(site / place, {"METADATA": head + metadata, **more})
        return site / place

    return put


def found(site):
    return find_distributions([str(site)])


def test_a_distribution_is_its_name_version_licence_and_files(site, install):
    install("a", CODE, version="2.0+cpu")
    install("B_b", {"b.py": "b"})
    (a, b), left_out = found(site)
    assert (a.name, a.licence, b.name) == ("a-2.0+cpu", "MIT", "B_b-1.0")
    assert a.files == tuple((name, str(site / name)) for name in sorted(CODE))
    assert left_out == {}


def test_files_outside_of_the_directory_are_nobodys(site, install):
    install("a", {"a.py": "a"}, record=["a.py", "../../../bin/tool.py", "/etc/x.py", "a/../../b.py"])
    ((a,), _) = found(site)
    assert [name for name, _ in a.files] == ["a.py"]


def test_a_file_of_two_distributions_is_the_firsts_by_name(site, install):
    install("Mlflow", {"m/x.py": "x", "m/y.py": "y"})
    install("mlflow-skinny", {"m/x.py": "x", "s.py": "s"})
    install("mlflow-thin", {"m/x.py": "x"})
    distributions, _ = found(site)
    assert {each.name: [name for name, _ in each.files] for each in distributions} == {
        "Mlflow-1.0": ["m/x.py", "m/y.py"],
        "mlflow-skinny-1.0": ["s.py"],
    }


@pytest.mark.parametrize(
    ("metadata", "licence"),
    [
        ("License-Expression: Apache-2.0 OR MIT\nLicense: other\nClassifier: License :: Other\n", "Apache-2.0 OR MIT"),
        ("Classifier: Topic :: X\nClassifier: License :: OSI Approved :: MIT License\n", "MIT License"),
        (
            "Classifier: License :: OSI Approved\nClassifier: License :: Public Domain\n"
            "Classifier: License :: OSI Approved :: Zero-Clause BSD (0BSD)\n",
            "Public Domain, Zero-Clause BSD (0BSD)",
        ),
        ("Classifier: License :: OSI Approved\nLicense: BSD 3-Clause\n        Copyright somebody\n", "BSD 3-Clause"),
        (f"License: {'x' * 500}\n", f"{'x' * 100}..."),
        ("License:\n", "not stated"),
        ("", "not stated"),
    ],
)
def test_a_licence_is_as_the_metadata_says(site, install, metadata, licence):
    install("a", CODE, metadata=metadata)
    ((a,), _) = found(site)
    assert a.licence == licence


def test_what_is_broken_is_left_out_and_named(site, install, write_tree):
    install("good", {"good.py": "good"})
    (install("unrecorded", {"u.py": "u"}) / "RECORD").unlink()
    (install("unreadable", {"w.py": "w"}) / "METADATA").write_bytes(b"Name: caf\xe9\n")
    (install("nameless", {"n.py": "n"}) / "METADATA").write_text("Version: 1.0\n")
    (install("up", {"p.py": "p"}) / "METADATA").write_text("Name: ../up\nVersion: 1.0\n")
    (install("empty", {"e.py": "e"}) / "METADATA").unlink()
    install("mine", {"__editable__.py": ""}, **{"direct_url.json": json.dumps({"dir_info": {"editable": True}})})
    install("~ood", {"good.py": "good"})
    write_tree(site, {"old.egg-info": "Name: old\nVersion: 1.0\n", "nobodys.py": "nobody's"})
    distributions, left_out = found(site)
    assert [each.name for each in distributions] == ["good-1.0"]
    assert left_out == {
        "unrecorded-1.0.dist-info": "no RECORD",
        "unreadable-1.0.dist-info": "metadata that cannot be read",
        "nameless-1.0.dist-info": "no name and version in its METADATA",
        "up-1.0.dist-info": "no name and version in its METADATA",
        "empty-1.0.dist-info": "no name and version in its METADATA",
        "mine-1.0.dist-info": "an editable install",
        "~ood-1.0.dist-info": "left behind by an uninstallation",
        "old.egg-info": "no RECORD",
    }


def test_a_directory_by_two_names_is_read_once(tmp_path, site, install):
    install("a", CODE)
    (tmp_path / "lib64").symlink_to(site)
    distributions, _ = find_distributions([str(site), str(tmp_path / "lib64"), str(tmp_path / "nothing")])
    assert [each.name for each in distributions] == ["a-1.0"]


def test_this_environment_s_packages_are_found():
    distributions, _ = find_distributions(site_packages())
    by_name = {each.name: each for each in distributions}
    numpy = by_name[f"numpy-{importlib.metadata.version('numpy')}"]
    assert "BSD" in numpy.licence
    assert "numpy/__init__.py" in dict(numpy.files)
    assert len({path for each in distributions for _, path in each.files}) == sum(len(d.files) for d in distributions)


# As a source


def test_installed_packages_are_a_corpus_of_python_files_in_seeded_order(site, install, read, list_of):
    install("a", CODE)
    install("pages", {"p.html": "no Python"})
    install("gone", {}, record=["gone.py"])
    install("b", {"b/x.py": "b", "b/tests/y.py": "test", "b/__pycache__/z.py": "cache"})
    entries = list_of({"s": "python:site-packages"}, exclude=("tests",))
    assert [(each.name, each.licence, len(each.files)) for each in entries] == [
        ("a-1.0", "MIT", 3),
        ("b-1.0", "MIT", 1),
    ]
    assert sorted(file.name for file in entries[0].files) == ["a-1.0/a.py", "a-1.0/a/__init__.py", "a-1.0/a/deep/x.py"]
    documents = read("python:site-packages", exclude=("tests",))
    assert [document.id for document in documents] == ["s/a-1.0", "s/b-1.0"]
    assert sorted(documents[0].text.split("\n")) == ["import a", "pass", "x = 1"]
    assert {read("python:site-packages", seed=seed)[0].text for seed in range(8)} > {documents[0].text}
    every = read("python:site-packages", suffixes=(".py", ".html", ".json"))
    assert [each.id for each in every] == ["s/a-1.0", "s/b-1.0", "s/pages-1.0"]


def test_the_manifest_of_a_package_names_its_licence_and_nothing_else_changes(site, install, list_of, tmp_path):
    install("a", {"a.py": "a"})
    (tmp_path / "a.txt").write_text("a")
    (package,), (file,) = list_of({"s": "python:site-packages"}), list_of({"s": tmp_path / "a.txt"})
    content = package.files[0].content
    assert package.identity() == ["s", "a-1.0", [["a-1.0/a.py", content]], "MIT"]
    assert file.identity() == ["s", "a.txt", [["a.txt", content]]]


def test_a_package_beyond_the_limit_is_its_beginning_and_one_without_is_counted(site, install, read):
    install("a", CODE)
    install("large", {"large.py": "x" * 1000})
    first, large = read("python:site-packages", max_tree_bytes=12)
    assert 0 < len(first.text) <= 12 + 1
    assert large == Dropped("every file larger than max_tree_bytes", "large-1.0")


def test_what_is_left_out_is_said(site, install, list_of, capfd):
    install("a", CODE)
    (install("b", {"b.py": "b"}) / "RECORD").unlink()
    list_of({"s": "python:site-packages"})
    assert "source 's': left out: b-1.0.dist-info (no RECORD)" in capfd.readouterr().err


def test_an_environment_without_packages_is_one_clear_error(site, list_of):
    with pytest.raises(UserError, match=r"source 's': python:site-packages holds no files with suffixes \.py: check"):
        list_of({"s": "python:site-packages"})


def test_the_same_environment_gives_the_same_documents(site, install, read):
    install("a", CODE)
    first, again = (read("python:site-packages", seed=3) for _ in range(2))
    assert first == again
    assert all(isinstance(each, Document) for each in first)
