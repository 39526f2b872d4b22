"""Published files of the data sets: addresses, checksums, and the check of what a file holds.

`PUBLISHED` has the checksums of what files hold, however it is compressed: the numbers of a gzipped
idx file, the matrix in Olivetti's .mat, the records of CIFAR (all or the first), SVHN's files byte
by byte; `SERVED` and `ARCHIVES` those of files as they are served, where they differ. Those of idx
files, matrix and first records were computed from files that equal the published ones or of which
two lossless copies agree; CIFAR's files stand in Apache MXNet, its archives in MLDatasets.jl,
SVHN's in torchvision, the .mat's in scikit-learn.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

Content = bytes | np.ndarray

KINDS = {32: "md5", 40: "sha1", 64: "sha256"}  # by the digest's length
REMEDY = (
    "delete it and get it again, or point $KRONSCOPE_DATA to another folder; for data of your own "
    "register a problem of your own (CONTRIBUTING.md)"
)
FETCHED_FACES = "scikit-learn's copy of Olivetti's faces"


def _tables(text: str) -> dict[str, dict[str, str]]:
    """Digests of files by data set: of lines with its title, each before indented ones of files."""
    tables: dict[str, dict[str, str]] = {}
    for line in text.strip().splitlines():
        if not line.startswith(" "):
            own = tables[line] = {}
            continue
        name, digest = line.split()
        own[name] = digest
    return tables


PUBLISHED = _tables("""
MNIST
    train-images-idx3-ubyte.gz 741c988805d008ac6e4c904b69001ba184c24b2c540a4ef403f4c71b676cf757
    t10k-images-idx3-ubyte.gz 6d87418db22cc8025d05968bec9bd5c3932904b23485740db143a061a2c9d161
    train-labels-idx1-ubyte.gz 1feba77c54802fa5339a11837ea4b2866434b83314ec45192930f1df69120c13
    t10k-labels-idx1-ubyte.gz ddeff807876a9661a1110d45c266c86239a3a1b7d37da0c3716a7a683c852ff5
Fashion-MNIST
    train-images-idx3-ubyte.gz 2e487a6c89124f78f2d7521542223cafe96f7123c3ca13d447772ac6ecbb3012
    t10k-images-idx3-ubyte.gz c867c93ff95360594e8ec3287995350b824dd110b11595c0e13d5423f621867a
    train-labels-idx1-ubyte.gz 657fbd221bfc9f4198cc14b5619cc33ec57c58dd0e47af4d99d6650759e869a7
    t10k-labels-idx1-ubyte.gz 3d0e6c6ea990b53b6f8f500a41cac93881d981b315f84578b7d915342ade01e9
Olivetti's faces
    olivettifaces.mat 7964c5cc44c85859441189f37c95bb64ac343e67b4fed0ca51e40c35ef12643b
scikit-learn's copy of Olivetti's faces
    olivettifaces.mat b612fb967f2dc77c9c62d3e1266e0c73d5fca46a4b8906c18e454d41af987794
CIFAR-10
    data_batch_1.bin aadd24acce27caa71bf4b10992e9e7b2d74c2540
    data_batch_2.bin c0ba65cce70568cd57b4e03e9ac8d2a5367c1795
    data_batch_3.bin 1dd00a74ab1d17a6e7d73e185b69dbf31242f295
    data_batch_4.bin aab85764eb3584312d3c7f65fd2fd016e36a258e
    data_batch_5.bin 26e2849e66a845b7f1e4614ae70f4889ae604628
    test_batch.bin 67eb016db431130d61cd03c7ad570b013799c88c
the subset of CIFAR-10
    data_batch_1.bin 0993cf8b8e43bc207603aef9787006995746513f5e3fa5a52e06d1b069926330
    data_batch_2.bin 57dc4e8db7ddc925938d1f2821ee0b499020fa077bedd98d88e6459c7cacb2ab
    data_batch_3.bin be335161c2afa9c985a48c2dec47238b9438dd6686773cc9725a5bfc8217e3f2
    data_batch_4.bin 34046a49d60fa18b42147571ad4e995a81c77fb47b46fef2e0798d19c0a30303
    data_batch_5.bin e04d47eac99eb22c5406c696680423d9d7ff080be029363b6c6b947c5165f985
    test_batch.bin c77ad46116beb3508f55d38aa34893560beae9515f9aca4a4dd0ea3617ac289e
CIFAR-100
    train.bin e207cd2e05b73b1393c74c7f5e7bea451d63e08e
    test.bin 8fb6623e830365ff53cf14adec797474f5478006
SVHN
    train_32x32.mat e26dedcc434d2e4c54c9b2d4a06d8373
    test_32x32.mat eb5a983be6a315427106f1b164d9cef3
""")
SERVED = _tables("""
MNIST
    train-images-idx3-ubyte.gz 440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609
    t10k-images-idx3-ubyte.gz 8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6
    train-labels-idx1-ubyte.gz 3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c
    t10k-labels-idx1-ubyte.gz f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6
Fashion-MNIST
    train-images-idx3-ubyte.gz 3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84
    t10k-images-idx3-ubyte.gz 346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073
    train-labels-idx1-ubyte.gz a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845
    t10k-labels-idx1-ubyte.gz 67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5
""") | {"Olivetti's faces": PUBLISHED[FETCHED_FACES]}
ARCHIVES = {
    "cifar-10-binary.tar.gz": "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    "cifar-100-binary.tar.gz": "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
}


@dataclass(frozen=True)
class Source:
    """Address of a data set's files, and the names of its folder.

    shown: the files, for people. url: of a file, {} its name, after # if it is in an archive.
    folder: its name in the cache. others: patterns of its name in $KRONSCOPE_DATA besides.
    """

    folder: str
    shown: str
    url: str
    others: tuple[str, ...] = ()


FASHION = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/{}"
CIFAR = "https://www.cs.toronto.edu/~kriz/cifar-{}-binary.tar.gz#{{}}"
FACES = "https://ndownloader.figshare.com/files/5976027"
SOURCES = {
    "MNIST": Source("mnist", "*.gz", "https://ossci-datasets.s3.amazonaws.com/mnist/{}"),
    "Fashion-MNIST": Source("fashion-mnist", "*.gz", FASHION),
    "Olivetti's faces": Source("olivetti", "olivettifaces.mat", FACES, ("olivetti*",)),
    "CIFAR-10": Source("cifar10", "*.bin", CIFAR.format(10), ("cifar10[!0]*", "cifar-10-*")),
    "CIFAR-100": Source("cifar100", "*.bin", CIFAR.format(100), ("cifar100*", "cifar-100-*")),
    "SVHN": Source("svhn", "*_32x32.mat", "http://ufldl.stanford.edu/housenumbers/{}", ("svhn*",)),
}


def same(content: Content, data_set: str, file: str) -> bool:
    """Whether this is the content of the data set's published file."""
    expected = PUBLISHED[data_set][file]
    return _digest(content, KINDS[len(expected)]) == expected


def _digest(content: Content, kind: str) -> str:
    plain = content if isinstance(content, bytes) else np.ascontiguousarray(content).data
    return hashlib.new(kind, plain, usedforsecurity=False).hexdigest()


def check(path: Path, content: Content, data_set: str, file: str) -> None:
    """Compare the content of `path` with that of the data set's published file.

    Raises: ValueError naming the path, what was expected, whose content it is where that is known,
    and the remedy.
    """
    if same(content, data_set, file):
        return
    found = [_digest(content, kind) for kind in KINDS.values()]
    holds = "it was changed, or is of another data set"
    for other, files in PUBLISHED.items():
        for name in (name for name, digest in files.items() if digest in found):
            holds = f"it is the {name} of {other}"
    expected = PUBLISHED[data_set][file]
    raise ValueError(
        f"{path} has the form of the {file} of {data_set}, but not its content (its "
        f"{KINDS[len(expected)]} is not {expected}): {holds}; {REMEDY}"
    )
