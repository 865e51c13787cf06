// On which NUMA node memory is made that a GPU copies from and to: one that lies behind another processor costs
// bandwidth, and which node a thread's pages come from is chance otherwise.

#pragma once

namespace kvs {

/** While it lives, this thread's new pages come from `node` while there are some. A thread with a policy of its own
 * (numactl) keeps it, and where the system allows no policies nothing changes. */
class NumaPreference {
 public:
  /** node below zero: no preference. */
  explicit NumaPreference(int node);
  ~NumaPreference();
  NumaPreference(const NumaPreference&) = delete;
  NumaPreference& operator=(const NumaPreference&) = delete;

 private:
  bool is_set_ = false;
};

}  // namespace kvs
