"""From files to documents: what a source holds, cut into units of work, read.

corpus.py          the vocabulary: File, Entry, Unit, Document
storage.py         local files and URLs; compression.py: gzip, zstd, bzip2, xz
file_hashes.py     what names a file's content, remembered
formats.py         what a file's name says of it
listing.py         what the sources hold; trees.py: the order of files in a tree
directories.py     whether a directory holds records or is one document
distributions.py   the installed packages
units.py           entries cut into tasks' worth
readers.py         units -> documents; tables.py: rows of Parquet and Arrow; separated.py: of CSV
synthetic.py       made-up documents as files
recall.py          documents that train recall; recall_facts.py: what they tell, of
                   recall_names.py; recall_carrier.py: between
"""
