"""Gene id <-> vocabulary row, and the frozen protein vectors of those rows.

In: `<species>_gene.h5` files of the published layout (dataset `keys` of bytes, group `arrays/<key>`).
Out: a Vocab: ordered gene ids, the species file each came from, hashes, and the table itself, read when first asked for.
Shapes: G genes, E width of a protein vector.
"""
