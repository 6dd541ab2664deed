// Python's global lock, where there is a Python: without a symbol of it that would have to be
// there.
#pragma once

#include <dlfcn.h>

namespace fastl2o {

// Holds the lock for a scope. The dispatcher has let go of it, and torch takes it for each tensor
// that Python alone is about to refer to again: for a list, once is a tenth of the time.
class PythonLock {
 public:
  PythonLock() : functions_(functions()), taken_(functions_.initialised()) {
    if (taken_) state_ = functions_.ensure();
  }
  ~PythonLock() {
    if (taken_) functions_.release(state_);
  }
  PythonLock(const PythonLock&) = delete;
  PythonLock& operator=(const PythonLock&) = delete;

 private:
  struct Functions {
    int (*is_initialised)();
    int (*ensure)();
    void (*release)(int);

    bool initialised() const {
      return is_initialised != nullptr && ensure != nullptr && release != nullptr &&
             is_initialised() != 0;
    }
  };

  template <typename Function>
  static Function find(const char* name) {
    return reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, name));
  }

  static const Functions& functions() {
    static const Functions found{find<int (*)()>("Py_IsInitialized"),
                                 find<int (*)()>("PyGILState_Ensure"),
                                 find<void (*)(int)>("PyGILState_Release")};
    return found;
  }

  const Functions& functions_;
  const bool taken_;
  int state_ = 0;
};

}  // namespace fastl2o
