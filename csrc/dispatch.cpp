#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>

namespace ssm_fast {
namespace {

Isa chosen = Isa::baseline;

}  // namespace

std::string name(Isa isa) {
  switch (isa) {
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "baseline";
  }
}

std::vector<Isa> available_isas() {
  std::vector<Isa> isas{Isa::baseline};
#if defined(SSM_FAST_HAS_avx2)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    isas.push_back(Isa::avx2);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512bw")) {
      isas.push_back(Isa::avx512);
    }
  }
#endif
  return isas;
}

Isa chosen_isa() { return chosen; }

void choose_isa() {
  const auto isas = available_isas();
  chosen = isas.back();
  const char* wanted = std::getenv("SSM_FAST_ISA");
  if (wanted == nullptr || *wanted == '\0') return;
  std::string names;
  for (const Isa isa : isas) {
    if (name(isa) == wanted) {
      chosen = isa;
      return;
    }
    names += (names.empty() ? "" : ", ") + name(isa);
  }
  throw std::invalid_argument("SSM_FAST_ISA must be one of " + names + " on this machine, got '" + wanted + "'");
}

}  // namespace ssm_fast
