#include "cpu/plan_cache.h"

#include <algorithm>
#include <iterator>
#include <list>
#include <mutex>
#include <unordered_map>
#include <utility>

namespace maskmoe {
namespace {

constexpr size_t kMostChains = 4096;
constexpr int64_t kMostBytes = int64_t{1} << 29;

template <class V>
int64_t bytes_of(const V& of) {
  return static_cast<int64_t>(of.size() * sizeof(of[0]));
}

struct Compiled {
  Contents contents;
  Chain chain;

  int64_t bytes() const {
    int64_t sum = 0;
    for (const auto& content : contents) sum += bytes_of(content);
    for (const ExecutionPlan& plan : chain) {
      const Layout& l = plan.layout;
      for (const auto* sizes : {&l.row_sizes, &l.col_sizes, &l.row_offsets, &l.col_offsets,
                                &l.weight_offsets, &l.row_order, &l.col_order, &l.row_rank, &l.col_rank}) {
        sum += bytes_of(*sizes);
      }
      sum += bytes_of(l.present) + bytes_of(l.routes);
      for (const Panels* p : {&plan.forward, &plan.backward}) {
        sum += bytes_of(p->panels) + bytes_of(p->segments) + bytes_of(p->copies);
        sum += bytes_of(p->slots);
      }
    }
    return sum;
  }
};

struct Entry {
  std::vector<int64_t> ids;
  int width;
  std::vector<Encoded> serialized;  // where the values of its tensors lie
  std::shared_ptr<const void> held;
  std::shared_ptr<const Compiled> compiled;
  int64_t bytes;

  bool is_for(const PlanKey& key) const {
    return width == key.width && std::ranges::equal(ids, key.ids);
  }
};

using Entries = std::list<Entry>;  // the last used first

struct Cache {
  std::mutex mutex;
  Entries entries;
  std::unordered_multimap<int64_t, Entries::iterator> by_id;  // the first of an entry's ids
  int64_t bytes = 0;

  template <class Matches>
  std::shared_ptr<const Compiled> find(const PlanKey& key, const Matches& matches) {
    const auto [begin, end] = by_id.equal_range(key.ids.front());
    for (auto found = begin; found != end; ++found) {
      const Entries::iterator entry = found->second;
      if (!entry->is_for(key) || !matches(*entry)) continue;
      if (entry != entries.begin()) entries.splice(entries.begin(), entries, entry);
      return entry->compiled;
    }
    return nullptr;
  }

  // Moves an entry to `dropped`. What it holds is freed after the lock: a tensor that Python knows
  // waits for Python's own lock, whose owner may be waiting for this one.
  void drop(Entries::iterator entry, Entries& dropped) {
    const auto [begin, end] = by_id.equal_range(entry->ids.front());
    by_id.erase(std::find_if(begin, end, [&](const auto& of) { return of.second == entry; }));
    bytes -= entry->bytes;
    dropped.splice(dropped.end(), entries, entry);
  }
};

// Never destroyed: at exit, threads may still compute, and torch may be gone before.
Cache& cache() {
  static Cache* const the = new Cache;
  return *the;
}

std::shared_ptr<const Chain> chain_in(std::shared_ptr<const Compiled> compiled) {
  if (compiled == nullptr) return nullptr;
  const Chain* chain = &compiled->chain;
  return {std::move(compiled), chain};
}

}  // namespace

std::shared_ptr<const Chain> find_plans(const PlanKey& key) {
  Cache& all = cache();
  const std::lock_guard<std::mutex> lock(all.mutex);
  return chain_in(all.find(key, [&](const Entry& entry) {
    return std::ranges::equal(key.serialized, entry.serialized);
  }));
}

std::shared_ptr<const Chain> keep_plans(const PlanKey& key, std::shared_ptr<const void> held,
                                        Contents contents,
                                        const std::function<Chain(const Contents&)>& make) {
  Cache& all = cache();
  std::shared_ptr<const Compiled> compiled;
  {
    const std::lock_guard<std::mutex> lock(all.mutex);
    compiled = all.find(key, [&](const Entry& entry) {
      return entry.compiled->contents == contents;
    });
  }
  if (compiled == nullptr) {
    Chain chain = make(contents);
    compiled = std::make_shared<const Compiled>(Compiled{std::move(contents), std::move(chain)});
  }
  const int64_t bytes = compiled->bytes();
  Entries added, dropped;
  added.push_back({{key.ids.begin(), key.ids.end()}, key.width,
                   {key.serialized.begin(), key.serialized.end()}, std::move(held), compiled,
                   bytes});
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.by_id.emplace(key.ids.front(), added.begin());
  all.entries.splice(all.entries.begin(), added);
  all.bytes += bytes;
  while (all.entries.size() > 1 &&
         (all.entries.size() > kMostChains || all.bytes > kMostBytes)) {
    all.drop(std::prev(all.entries.end()), dropped);
  }
  return chain_in(std::move(compiled));
}

void forget_plans(int64_t id) {
  Cache& all = cache();
  Entries dropped;
  const std::lock_guard<std::mutex> lock(all.mutex);
  for (auto entry = all.entries.begin(); entry != all.entries.end();) {
    const auto next = std::next(entry);
    if (std::find(entry->ids.begin(), entry->ids.end(), id) != entry->ids.end()) {
      all.drop(entry, dropped);
    }
    entry = next;
  }
}

int64_t count_plans() {
  Cache& all = cache();
  const std::lock_guard<std::mutex> lock(all.mutex);
  return static_cast<int64_t>(all.entries.size());
}

}  // namespace maskmoe
