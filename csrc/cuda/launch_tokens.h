// The seam between the kernels over tokens and the binding: plain structs, and launchers that return a
// cudaError_t.  Every array is contiguous and on the device.
#pragma once
#include <cstdint>

#include "../rows.h"
#include "queue.h"

namespace fd {

constexpr int32_t kFloat64 = 3;  // beside DType's

struct Values {
  const void* data = nullptr;  // [count]
  int32_t dtype = kFloat32;
};

// Two numbers of each token.
struct Pairs {
  Values x, y;
  const uint8_t* mask = nullptr;  // [count] 0: not counted; null: all are
  int64_t count = 0;
};

// Sums over some tokens.  What a large common offset would cost in digits is kept by shifts: the last three
// are sums of x - shift_x, of y - shift_y and of their products.
struct PairSums {
  double count, x, y, shift_x, shift_y, rest_x, rest_y, products;
};
constexpr int kPairSums = sizeof(PairSums) / sizeof(double);

constexpr int kMostParts = 512;

struct Moments {
  Pairs tokens;
  PairSums* parts = nullptr;    // [kMostParts] scratch
  uint32_t* arrived = nullptr;  // 0; counts the blocks that have written their part
  PairSums* total = nullptr;    // shifts are the means
  int64_t loops = 0;            // the launcher's: what a block takes, in steps
};
int moments(Moments args, const Queue& queue);

struct Centre {
  Pairs tokens;
  const PairSums* total = nullptr;  // of the whole scope
  int32_t dtype = kFloat32;         // of the results, or kFloat64
  void* per_token = nullptr;        // [count] (x - mean x)(y - mean y); 0 where masked
  void* scalars = nullptr;          // [3] covariance, mean x, mean y
  int64_t* valid = nullptr;         // how many tokens the mask leaves
};
int centre(const Centre& args, const Queue& queue);

// Selection takes the k smallest tokens by (key, number), both unsigned.  The key of a token is its score, in
// bits that have the scores' order, or a random number that `drawn` and the token's number decide.
struct Candidates {
  Values scores;                    // null: random keys
  bool largest = false;             // takes the largest scores
  uint64_t drawn = 0;               // of seed and step
  const uint8_t* mask = nullptr;    // [count] 0: not to choose; null: all are
  const int64_t* index = nullptr;   // [count] numbers in the whole scope; null: positions, from
  const int64_t* offset = nullptr;  // this one, or from 0
  int64_t count = 0;
};

// How many are to be taken: `*on_device` if there is one, else that ratio of them all if it is not 0, else
// `k`.
struct Quota {
  const int64_t* on_device = nullptr;
  double ratio = 0.0;
  int64_t k = 0;
};

constexpr int kDigitBits = 11, kBins = 1 << kDigitBits;

// What is known of the last token to be taken: the digits found so far of its key and number, how many tokens
// are wanted of those that share them, and whether that is all of them; then the digits not found are the
// largest.
struct Found {
  uint64_t key, number;
  int64_t need, settled;
};
constexpr int kFoundFields = sizeof(Found) / sizeof(int64_t);

// A digit that has been counted, over the whole scope.
struct Counted {
  const int64_t* counts = nullptr;  // [kBins]; null: there is none
  const Found* found = nullptr;     // before this digit
  int32_t shift = 0;
  bool of_number = false;  // not of the key
  bool first = false;      // of all digits: its counts tell how many tokens there are
};

// Finds the digit before, then counts the next one of the tokens that share all before.
struct CountDigits {
  Candidates tokens;
  Quota quota;
  Counted before;
  int32_t shift = 0;
  bool of_number = false;
  int64_t* counts = nullptr;  // [kBins] zeros
  Found* found = nullptr;     // for the next launch
  int64_t loops = 0;          // the launcher's
};
int count_digits(CountDigits args, const Queue& queue);

// Finds the last digit, and marks the tokens up to the last one to be taken.
struct Choose {
  Candidates tokens;
  Quota quota;
  Counted last;
  bool* chosen = nullptr;  // [count]
};
int choose(const Choose& args, const Queue& queue);

}  // namespace fd
