"""Figures as text, for a terminal and for the documents: a plot with both axes logarithmic, and how fast
something grows.
"""

import math


def exponent(points):
    """The slope of the line through the logarithms of `points`, by least squares: 1 is linear growth."""
    logs = [(math.log(x), math.log(y)) for x, y in points]
    mean_x = sum(x for x, _ in logs) / len(logs)
    mean_y = sum(y for _, y in logs) / len(logs)
    return (sum((x - mean_x) * (y - mean_y) for x, y in logs) /
            sum((x - mean_x) ** 2 for x, _ in logs))


def log_log(series, columns=60, rows=16):
    """`series`: name -> points, all above 0. The first letter of its name marks a series, `*` a place
    of several. Grid lines at the powers of ten."""
    points = [point for one in series.values() for point in one]
    (x_low, x_high), (y_low, y_high) = [
        [edge(math.log10(point[axis]) for point in points) for edge in (min, max)]
        for axis in (0, 1)]
    y_low, y_high = math.floor(y_low), math.ceil(y_high)

    def column(value):
        return round((value - x_low) / ((x_high - x_low) or 1) * (columns - 1))

    def row(value):
        return round((y_high - value) / ((y_high - y_low) or 1) * (rows - 1))

    field = [[" "] * columns for _ in range(rows)]
    for power in range(y_low, y_high + 1):
        field[row(power)] = ["."] * columns
    for name, one in series.items():
        for x, y in one:
            place = field[row(math.log10(y))]
            at = column(math.log10(x))
            place[at] = name[0] if place[at] in " ." else "*"
    labels = {row(power): f"1e{power:+d}" for power in range(y_low, y_high + 1)}
    lines = [f"{labels.get(i, ''):>6} |{''.join(place)}".rstrip() for i, place in enumerate(field)]
    axis = [" "] * (columns + 12)
    for x in sorted({x for x, _ in points}):
        text = f"{x:,.0f}"
        at = max(0, column(math.log10(x)) - len(text) + 1)
        if all(c == " " for c in axis[max(0, at - 1):at + len(text)]):
            axis[at:at + len(text)] = text
    lines += [f"{'':>6} +{'-' * columns}", f"{'':>8}{''.join(axis)}".rstrip()]
    return "\n".join(lines)
