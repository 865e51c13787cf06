// How the tiles of a prompt's product are dealt to clusters of thread blocks: host and device agree by the same code.

#pragma once

#include <cstdint>

namespace kvs {

constexpr int prompt_tile_rows = 128;  // of a thread block
constexpr int prompt_tile_outputs = 256;

/** What a cluster multiplies at a time: rows * cluster by all outputs of a tile or a half of them. */
struct PromptUnit {
  int row_tile;  // of the cluster
  int output;    // the first one
  bool is_half;
};

/** Tiles in the order in which they are taken: up to 2048 rows by one tile of outputs, then the next outputs, so that
 * what runs at once reads about as many rows of W as of x. Where the last round would leave most clusters idle, its
 * tiles are halves. */
struct PromptSchedule {
  int row_tiles;
  int output_tiles;
  int group_rows;  // tiles of rows taken together
  int whole;       // tiles that are not halved: the first ones
  int units;

  PromptSchedule() = default;
  __host__ __device__ PromptSchedule(int rows, int outputs, int cluster, int clusters)
      : row_tiles((rows + prompt_tile_rows * cluster - 1) / (prompt_tile_rows * cluster)),
        output_tiles((outputs + prompt_tile_outputs - 1) / prompt_tile_outputs) {
    constexpr int rows_together = 2048;
    const int together = rows_together / (prompt_tile_rows * cluster);
    group_rows = together < row_tiles ? together : row_tiles;
    const int tiles = row_tiles * output_tiles;
    const int last = tiles % clusters;
    whole = 2 * last <= clusters ? tiles - last : tiles;
    units = whole + 2 * (tiles - whole);
  }

  __host__ __device__ PromptUnit unit(int at) const {
    const bool is_half = at >= whole;
    const int tile = is_half ? whole + (at - whole) / 2 : at;
    const int group = tile / (group_rows * output_tiles);
    const int within = tile - group * group_rows * output_tiles;
    const int first = group * group_rows;
    const int rows = row_tiles - first < group_rows ? row_tiles - first : group_rows;
    const int column = within / rows;
    const int half = is_half ? (at - whole) % 2 : 0;
    return {first + within - column * rows, column * prompt_tile_outputs + half * (prompt_tile_outputs / 2), is_half};
  }

  /** How long the clusters are at it, in whole tiles. */
  double rounds(int clusters) const {
    constexpr double half_cost = 0.6;  // its operands come twice as often
    const int full_rounds = (whole + clusters - 1) / clusters;
    return full_rounds + (units > whole ? half_cost : 0.0);
  }
};

}  // namespace kvs
