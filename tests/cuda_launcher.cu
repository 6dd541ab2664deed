// What a launcher makes of a process without a device: the error, and how many blocks of 100.
#include <cstdio>

#include "launcher.h"

int main() {
  const fastl2o::cuda::Launcher launch(nullptr);
  std::printf("%s %d\n", launch.ok() ? "ok" : "error", launch.grid(100, 4));
}
