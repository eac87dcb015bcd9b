"""The report."""


def write(folder):
    return ""
