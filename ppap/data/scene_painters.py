"""Painters of synthetic scenes: each puts one element onto the canvas, with its label and its depth."""

import numpy as np

from ppap.data.scene_canvas import Canvas

CLASS_NAMES = ("sky", "water", "grass", "tree", "road", "building", "vehicle", "sand")
SKY, WATER, GRASS, TREE, ROAD, BUILDING, VEHICLE, SAND = range(len(CLASS_NAMES))


def paint_sky(canvas: Canvas) -> None:
    """A gradient from zenith to horizon, with clouds that are wider than high."""
    rng, size = canvas.rng, canvas.size
    hue, most = ((0.58, 0.75), (0.06, 0.6), (0.9, 0.35))[rng.choice(3, p=[0.75, 0.15, 0.1])]
    zenith = canvas.colour((hue - 0.04, hue + 0.04), (0.05, most), (0.45, 0.95))
    canvas.haze = 0.35 * zenith + 0.65 * canvas.colour((0.02, 0.15), (0, 0.3), (0.75, 1))
    up = np.clip(-canvas.rows * np.float32(canvas.focal / canvas.horizon), 0, 1)[..., None]
    canvas.rgb[:] = canvas.haze + (zenith - canvas.haze) * up**0.8
    clouds = canvas.noise((size, size), size / 16) + 0.6 * canvas.noise((size, size), size / 32)
    clouds = clouds[np.arange(size) * 5 // 2 % size, :, None]
    cover = np.clip(0.5 * clouds + np.float32(rng.uniform(-0.9, 0.5)), 0, 1) * np.minimum(up * 4, 0.9)
    white = (0.85 + 0.15 * canvas.haze) * np.float32(rng.uniform(0.75, 1)) * (0.92 + 0.05 * clouds)
    canvas.rgb += (white - canvas.rgb) * cover


def paint_wood(canvas: Canvas, height: float, z: float) -> None:
    """A far wood along the whole horizon."""
    size = canvas.size
    tops = 1 + 0.25 * canvas.noise((1, size), size / 12) + 0.15 * canvas.noise((1, size), 1)
    up = canvas.height - canvas.rows * z
    light = 1 + 0.2 * canvas.noise((size, size), 1)[..., None]
    leaves = canvas.colour((0.08, 0.4), (0.15, 0.6), (0.2, 0.5)) * light
    canvas.paste(np.s_[:, :], TREE, z, [((up > 0) & (up < np.maximum(tops, 0.1) * height), leaves)])


def paint_ground(canvas: Canvas, kind: int, mask: np.ndarray) -> None:
    """Cover the part of the ground that ``mask`` (H, W) selects with water, grass, road or sand."""
    mask = mask & (canvas.z > 0)
    if mask.any():
        canvas.rgb[mask] = {WATER: _water, GRASS: _grass, ROAD: _road, SAND: _sand}[kind](canvas, mask)
        canvas.label[mask] = kind
        canvas.depth[mask] = canvas.z[mask]


def _water(canvas: Canvas, mask: np.ndarray) -> np.ndarray:
    # Far water mirrors the sky at grazing angles, near water shows its own colour; crests lie along x.
    own = canvas.colour((0.3, 0.65), (0.15, 0.7), (0.2, 0.65))
    mirror = 0.8 * (1 - np.exp(-canvas.z[mask] / 25))[:, None]
    waves = canvas.ground_noise(mask, 5, 0.9) + 0.7 * canvas.ground_noise(mask, 14, 3)
    streaks = canvas.noise(mask.shape, (0, canvas.size / 40))[mask]
    light = 1 + canvas.rng.uniform(0.06, 0.15) * (waves + 0.5 * streaks)
    glint = canvas.rng.uniform(0, 0.6) * np.clip(waves + 0.6 * streaks - 2.2, 0, 0.5)
    return (own + (0.9 * canvas.haze - own) * mirror) * light[:, None] + glint[:, None]


def _grass(canvas: Canvas, mask: np.ndarray) -> np.ndarray:
    # Upright blades near the camera, meadows of another green behind.
    base = canvas.colour((0.13, 0.37), (0.3, 0.75), (0.3, 0.65))
    other = base * canvas.rng.uniform(0.65, 1.25, 3)
    blend = np.clip(0.5 + 0.5 * canvas.ground_noise(mask, 12, 20), 0, 1)[:, None]
    blades = canvas.noise(mask.shape, (canvas.size / 128, 0))[mask]
    light = 1 + 0.2 * np.clip(9 / canvas.z[mask], 0.25, 1) * blades + 0.1 * canvas.ground_noise(mask, 1, 2)
    return (base + (other - base) * blend) * light[:, None]


def _road(canvas: Canvas, mask: np.ndarray) -> np.ndarray:
    base = canvas.colour(((0.02, 0.15), (0.5, 0.75))[canvas.rng.integers(2)], (0, 0.25), (0.25, 0.62))
    light = 1 + 0.05 * canvas.ground_noise(mask, 3, 9) + 0.025 * canvas.noise(mask.shape, 0)[mask]
    return base * light[:, None]


def _sand(canvas: Canvas, mask: np.ndarray) -> np.ndarray:
    # Dunes, footprints (dark hollows) and grain.
    base = canvas.colour((0.04, 0.15), (0.1, 0.5), (0.5, 0.95))
    hollows = np.clip(canvas.ground_noise(mask, 0.9, 0.9) - 1, 0, 2)
    grain = 0.045 * canvas.noise(mask.shape, 0)[mask]
    return base * (1 + 0.07 * canvas.ground_noise(mask, 6, 6) - 0.14 * hollows + grain)[:, None]


def paint_road(canvas: Canvas, centre: np.ndarray | float, half: float, marked: bool) -> None:
    """A road along z: ``centre`` is its middle at each pixel, ``half`` its half width."""
    offset = np.abs(canvas.x - centre)
    paint_ground(canvas, ROAD, offset < half)
    if marked:
        line = (offset < 0.12 + 0.4 / (canvas.size * canvas.focal) * canvas.z) & (canvas.z % 7 < 4)
        line = (line | (np.abs(offset - half + 0.4) < 0.12)) & (canvas.label == ROAD) & (canvas.z < 70)
        canvas.rgb[line] = 0.35 * canvas.rgb[line] + 0.65 * canvas.rng.uniform(0.8, 1)


def paint_tree(canvas: Canvas, x: float, z: float, height: float) -> None:
    """A trunk with a crown of leafy balls."""
    rng = canvas.rng
    width = height * rng.uniform(0.55, 0.95)
    canvas.shadow(x, z, width, width)
    window = canvas.window(x, z, width, height)
    if window is None:
        return
    place, u, v = window
    side, inside, relief = u * 2 - 1, np.float32(-1), np.float32(0)
    for _ in range(rng.integers(5, 9)):
        r = rng.uniform(0.18, 0.26)
        du, dv = (side - rng.uniform(-0.5, 0.5)) / (2 * r), (v - rng.uniform(0.5, 0.78)) / r
        ball = 1 - du**2 - dv**2
        relief = np.where(ball > inside, 0.6 * (canvas.sun * du + dv), relief)
        inside = np.maximum(inside, ball)
    grain = canvas.size * min(canvas.focal * height / z / 22, 1 / 40)  # leaves, not balls, however near
    leaves = canvas.noise(inside.shape, grain) + 0.5 * canvas.noise(inside.shape, grain / 2)
    light = np.clip(1 + (1 - canvas.shade) * (relief + v - 0.65) + 0.22 * leaves, 0.25, 1.8)[..., None]
    crown = canvas.colour((0.03, 0.45), (0.3, 0.75), (0.25, 0.6)) * light
    bark = canvas.colour((0.02, 0.1), (0.15, 0.5), (0.15, 0.45)) * (1 + 4 * canvas.sun * side[..., None])
    trunk = (np.abs(side) < 0.06 + 0.03 * (1 - v)) & (v < 0.5)
    canvas.paste(place, TREE, z, [(trunk, np.clip(bark, 0.05, 1)), (inside + 0.13 * leaves > 0, crown)])


def paint_building(canvas: Canvas, x: float, z: float, size: np.ndarray) -> None:
    """A block of (width, height, depth) with its front at z and a side receding; low ones have a roof."""
    rng, (width, height, depth) = canvas.rng, size.tolist()
    hue = (0.04, 0.12, 0.58, 0.3)[rng.integers(4)]
    wall = canvas.colour((hue - 0.04, hue + 0.06), (0, 0.5), (0.4, 0.95))
    glass = canvas.haze * rng.uniform(0.15, 0.65) + rng.uniform(0, 0.2)
    step, storey, pane = rng.uniform(1.6, 3.2), rng.uniform(2.6, 3.4), rng.uniform(0.35, 0.75)
    canvas.shadow(x, z + depth / 2, width * 1.3, depth * 1.2)

    def wall_at(along: np.ndarray, far: np.ndarray, seen: np.ndarray, light: float) -> None:
        # all (1, W): metres along the wall, its depth, and the columns that see it, which lie side by side
        columns = np.flatnonzero(seen)
        if not len(columns):
            return
        columns = slice(columns[0], columns[-1] + 1)
        along, far = along[:, columns], far[:, columns]
        top, foot = (canvas.height - height) / far, canvas.height / far
        rows = np.flatnonzero((canvas.rows[:, 0] > top.min()) & (canvas.rows[:, 0] < foot.max()))
        if not len(rows):
            return
        place = np.s_[rows[0] : rows[-1] + 1, columns]
        up = canvas.height - canvas.rows[place[0]] * far
        mask = (up > 0) & (up < height)
        window = (along % step < step * pane) & (np.abs(up % storey - 1.5) < 0.75) & (up < height - 0.5)
        plain = 1 + 0.035 * canvas.noise(up.shape, 1) - 0.12 * (up > height - 0.35)
        layers = [(mask, light * wall * plain[..., None]), (mask & window, light * glass)]
        canvas.paste(place, BUILDING, far, layers)

    left, right, cols = x - width / 2, x + width / 2, canvas.cols
    far = (left if left > 0 else min(right, 0)) / np.where(np.abs(cols) < 1e-4, 1e-4, cols)
    wall_at(far, far, (far > z) & (far < z + depth), canvas.shade if canvas.sun * x > 0 else 1)
    front = (cols * z > left) & (cols * z < right)
    wall_at(cols * z - left, np.full_like(cols, z), front, 0.5 + canvas.shade / 2)
    roof = rng.uniform(1.5, 3.5)
    window = canvas.window(x, z, width * 1.1, height + roof)
    if height < 9 and window is not None:
        place, u, v = window
        up = (v * (height + roof) - height) / roof
        mask = (up > -0.08) & (np.abs(u * 2 - 1) < 1 - 0.3 * np.maximum(up, 0))
        light = 1 - 0.15 * (up * 7 % 1 < 0.4) + 0.05 * canvas.noise(mask.shape, 0)
        tiles = canvas.colour((0, 0.1), (0.1, 0.7), (0.25, 0.65)) * light[..., None]
        canvas.paste(place, BUILDING, z * 0.99, [(mask, tiles)])


def paint_car(canvas: Canvas, x: float, z: float, view: str) -> None:
    """A car, van or bus seen from its ``"side"``, ``"front"`` or ``"back"``."""
    kind = canvas.rng.choice(3, p=[0.65, 0.2, 0.15])
    length, width, height = ((4.3, 1.9, 1.5), (5.2, 2.1, 2.2), (10, 2.5, 3.1))[kind]
    across = length if view == "side" else width
    canvas.shadow(x, z, across * 1.2, 3)
    window = canvas.window(x, z, across, height)
    if window is None:
        return
    place, u, v = window
    u = u if canvas.rng.random() < 0.5 else 1 - u
    side, belt, edge = view == "side", 0.45 if kind else 0.58, np.minimum(u, 1 - u)
    slant = 0.02 if kind else (0.19 if side else 0.04) + 0.3 * (v - belt)
    body, cabin = (v > 0.3 / height) & (v < belt) & (edge > 0), (v >= belt) & (v < 0.98) & (edge > slant)
    pane = cabin & (v > belt + 0.05) & (v < (0.8 if kind else 0.92)) & (edge > slant + 0.03)
    pane &= (u * length % 1.4 > 0.14) | (not side)
    spokes = np.hypot(edge * length - 0.85, v * height - 0.36)
    wheel = spokes < 0.36 if side else (v < 0.25) & (np.abs(edge - 0.1) < 0.07)
    lamp = body & (np.abs(v - belt * 0.8) < 0.08) & (edge < (0.03 if side else 0.15))
    rear = lamp & ((u > 0.5) if side else view == "back")
    paint = canvas.colour((0, 1), (0, 0.9), (0.2, 0.95)) * (0.72 + 0.45 * v[..., None])
    layers = [(body | cabin, paint), (body & (v < belt * 0.45), 0.5 * paint), (wheel, 0.07)]
    layers += [(wheel & side & (spokes < 0.18), 0.5), (pane, 0.1 + 0.3 * canvas.haze * v[..., None])]
    layers += [(lamp, np.float32([1, 0.96, 0.82])), (rear, np.float32([0.82, 0.09, 0.07]))]
    canvas.paste(place, VEHICLE, z, layers)
