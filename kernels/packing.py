"""Weights and per-channel numbers in the order that the micro-kernels read them; functions on addresses, to be compiled by njit.

Two families, as in graphopt.kernels.dialects: quads of s8, and pairs of int16. Sizes are in bytes.
"""

from __future__ import annotations

from graphopt.kernels.memory import ld32, ldu8, st16, st32, stu8

LANES = 4  # int32 lanes of a vector; set for each rung


def signed_byte(address: int) -> int:
    """A s8."""
    value: int = (ldu8(address) ^ 128) - 128
    return value


def panel_bytes_quads(groups: int) -> int:
    """Size of a panel of 16 channels over `groups` groups of 4 taps."""
    return groups * 64


def panel_bytes_pairs(groups: int) -> int:
    """Size of a panel of 16 channels over `groups` groups of 4 taps."""
    return groups * 128


def panel_bytes_windows(groups: int) -> int:
    """Nothing: each panel has groups of its own (windows.py)."""
    return 0 * groups


def pack_panels_quads(target: int, source: int, panels: int, groups: int) -> None:
    """s8 [panels * 16][groups * 4] -> s8 [panels][groups][16][4]."""
    for n in range(panels * 16):
        for k in range(groups * 4):
            byte = ((n // 16 * groups + k // 4) * 16 + n % 16) * 4 + k % 4
            stu8(target + byte, ldu8(source + n * groups * 4 + k))


def pack_panels_pairs(target: int, source: int, panels: int, groups: int) -> None:
    """s8 [panels * 16][groups * 4] -> int16 [panels][groups][odd][16][2]: taps 0 and 2 of a group, then 1 and 3."""
    for n in range(panels * 16):
        for k in range(groups * 4):
            item = (((n // 16 * groups + k // 4) * 2 + k % 2) * 16 + n % 16) * 2 + k % 4 // 2
            st16(target + 2 * item, signed_byte(source + n * groups * 4 + k))


def channels_bytes(channels: int) -> int:
    """Size of what `pack_channels` writes."""
    return channels * LANES


def channel_of(g: int, i: int, lane: int, channels: int) -> int:
    """The channel under a lane of vector i of a chunk that starts in group g of 16; rows of channels follow one another."""
    return (g * 16 + lane // 4 * 16) % channels + 4 * i + lane % 4


def pack_channels(target: int, source: int, channels: int) -> None:
    """4-byte elements [channels] -> [channels / 16][4][LANES]: the vectors of a chunk that starts in each group."""
    for g in range(channels // 16):
        for i in range(4):
            for lane in range(LANES):
                st32(target + 4 * ((g * 4 + i) * LANES + lane), ld32(source + 4 * channel_of(g, i, lane, channels)))


def depthwise_bytes_quads(channels: int, kernel: int) -> int:
    """Size of what `pack_depthwise_quads` writes."""
    return kernel * ((kernel + 3) // 4) * channels_bytes(channels)


def depthwise_bytes_pairs(channels: int, kernel: int) -> int:
    """Size of what `pack_depthwise_pairs` writes."""
    return kernel * ((kernel + 1) // 2) * channels_bytes(channels)


def pack_depthwise_quads(target: int, source: int, channels: int, kernel: int) -> None:
    """s8 [C][kernel * kernel] -> [C / 16][kernel rows][sets of 4 taps][4][LANES] of s8 [4]; absent taps are 0."""
    sets = (kernel + 3) // 4
    for g in range(channels // 16):
        for row in range(kernel):
            for tap in range(sets * 4):
                for i in range(4):
                    for lane in range(LANES):
                        item = (((g * kernel + row) * sets + tap // 4) * 4 + i) * LANES + lane
                        at = source + (channel_of(g, i, lane, channels) * kernel + row) * kernel + tap
                        stu8(target + 4 * item + tap % 4, ldu8(at) if tap < kernel else 0)


def pack_depthwise_pairs(target: int, source: int, channels: int, kernel: int) -> None:
    """As `pack_depthwise_quads`, in sets of 2 taps, int16."""
    sets = (kernel + 1) // 2
    for g in range(channels // 16):
        for row in range(kernel):
            for tap in range(sets * 2):
                for i in range(4):
                    for lane in range(LANES):
                        item = (((g * kernel + row) * sets + tap // 2) * 4 + i) * LANES + lane
                        at = source + (channel_of(g, i, lane, channels) * kernel + row) * kernel + tap
                        st16(target + 4 * item + tap % 2 * 2, signed_byte(at) if tap < kernel else 0)
